"""What goes wrong around a run: two in a folder, an edited file, a killed process; then a fuzz."""

import contextlib
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_train import finished, flags, interrupt, without_what_takes_long  # noqa: F401
from torch import nn

import evaluate
import train_identity
import training_step
from data_utils import read_image
from model import Generator
from support import checkpoints, demo, figures, run_folder
from support.cli import InputError, run_script


def contents(folder):
    """{path: bytes} of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file()}


@pytest.fixture
def run(finished, tmp_path):  # noqa: F811
    """A copy of a finished run, to be harmed."""
    return shutil.copytree(finished, tmp_path / "run")


def refused(argv, main=train_identity.main):
    """The message of a command that is refused: one line."""
    with pytest.raises(InputError) as error:
        main(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------
# --overwrite


def test_overwrite_with_a_bad_number_costs_nothing(faces, run):
    before = contents(run)
    for flag in ("--seed=1000000000000000000000", "--seed=2147483648", "--batch_size=99999999999",
                 "--gamma=1e300", "--cache_gb=nan", "--cache_gb=inf", "--pretrain_epochs=-1"):
        message = refused([*flags(faces, run), "--overwrite", flag])
        assert message.startswith(f"argument {flag.split('=')[0]}: must be")
        assert contents(run) == before
    train_identity.parse(["--seed", "2147483647"])


def test_overwrite_keeps_the_old_run_until_the_new_one_can_be_resumed(faces, run, monkeypatch):
    before = contents(run)
    argv = [*flags(faces, run, "--seed", "5"), "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(training_step, "pixel_loss", lambda sr, hr: (sr - hr).sum() / 0)
        assert "pixel is not finite" in refused(argv)
    assert contents(run) == before
    with monkeypatch.context() as patch:
        interrupt(patch, 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_identity.main(argv)
    assert list(contents(run)) == ["last.pt"]
    train_identity.main(["--resume", "--out_dir", str(run)])
    assert checkpoints.read_run(run)["progress"]["flags"]["seed"] == 5
    assert json.loads((run / "config.json").read_text())["flags"]["seed"] == 5


def test_overwrite_writes_nothing_before_the_old_run_goes(faces, run, monkeypatch):
    """Between validation and last.pt the files of two runs would mix."""
    seen = []
    monkeypatch.setattr(train_identity, "validate_epoch", lambda *_: seen.append(contents(run)))
    with pytest.raises(TypeError):
        train_identity.main([*flags(faces, run), "--overwrite"])
    assert sorted(seen[0]) == [run_folder.LOCK, "last.pt"]


def test_a_kill_while_the_old_run_goes_leaves_the_rest_to_resume(faces, run, monkeypatch):
    argv = [*flags(faces, run, "--seed", "5"), "--overwrite"]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "delete_old_run", killed)
        with pytest.raises(KeyboardInterrupt):
            train_identity.main(argv)
    assert (run / "netG_epoch_2_2.pth").exists()  # the old run's, beside the new last.pt
    with monkeypatch.context() as patch:
        patch.setattr(train_identity, "validate_epoch", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train_identity.main(["--resume", "--out_dir", str(run)])
    assert sorted(contents(run)) == ["config.json", "last.pt"]
    assert json.loads((run / "config.json").read_text())["flags"]["seed"] == 5
    with monkeypatch.context() as patch:
        interrupt(patch, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_identity.main(["--resume", "--out_dir", str(run)])
    names = contents(run).keys()
    train_identity.main(["--resume", "--out_dir", str(run)])
    assert contents(run).keys() > names  # what the new run wrote, stays


# ---------------------------------------------------------------------------------------------
# One run in a folder


@pytest.fixture
def holder(run):
    """The id of a process that holds the lock of a run's folder."""
    child = os.fork()
    if not child:
        with run_folder.lock(SimpleNamespace(out_dir=run, train_dir="t", valid_dir="v")):
            (run / "held").touch()
            time.sleep(60)
        os._exit(0)
    while not (run / "held").exists():
        time.sleep(0.01)
    yield child
    with contextlib.suppress(ProcessLookupError):
        kill(child)


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@forks
def test_a_second_run_in_a_folder_is_refused(faces, run, holder):
    being_written = run / ".last.1.tmp.pt"
    being_written.touch()
    before = contents(run)
    for argv in (["--resume", "--out_dir", str(run), "--num_epochs", "3"],
                 [*flags(faces, run), "--overwrite"]):
        message = refused(argv)
        assert f"{run}: process {holder} on {os.uname().nodename} is training in it" in message
        assert contents(run) == before
    kill(holder)  # which leaves its lock file
    assert (run / run_folder.LOCK).exists()
    train_identity.main(["--resume", "--out_dir", str(run), "--num_epochs", "3"])
    assert not (run / run_folder.LOCK).exists() and not being_written.exists()


@forks
def test_other_ranks_take_no_lock(run, holder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with run_folder.lock(SimpleNamespace(out_dir=run, train_dir="t", valid_dir="v")):
        pass


def test_a_system_without_locks_or_hang_up_says_so(tmp_path, monkeypatch, capsys):
    """Windows, as far as it can be played here."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    spec = importlib.util.find_spec("support.run_folder")
    on_windows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(on_windows)
    args = SimpleNamespace(out_dir=tmp_path / "run", train_dir="t", valid_dir="v")
    with on_windows.lock(args), on_windows.lock(args):
        pass
    assert capsys.readouterr().out.count(f"let no other run write to {tmp_path / 'run'}") == 2
    assert not on_windows.catch_signals(1)
    monkeypatch.setattr(os, "open", lambda *_: exec("raise PermissionError"))  # of a folder
    checkpoints.save_text("text", tmp_path / "file.txt")
    assert (tmp_path / "file.txt").read_text() == "text"


def test_a_refused_run_leaves_no_folder(faces, tmp_path):
    for new in ("new", "a/b/c"):
        assert "none.pth" in refused(flags(faces, tmp_path / new, "--start", "none.pth"))
        assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# The user's files


def test_no_run_among_photographs(faces, tmp_path):
    data = shutil.copytree(faces, tmp_path / "data")
    (tmp_path / "link").symlink_to(data / "valid")
    before = contents(data)
    for out in (data / "train", data / "valid" / "new" / "run", tmp_path / "link"):
        message = refused(flags(data, out))
        assert f"--out_dir {out} lies in --" in message
    assert contents(data) == before


@pytest.mark.parametrize("name", ["curves.png", "samples/epoch_7.png"])
def test_pictures_of_others_are_not_written_over(faces, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("the user's")
    for more in ((), ("--overwrite",)):
        assert f"{path} was not written by this project" in refused(flags(faces, tmp_path, *more))
    assert contents(tmp_path) == {name: b"the user's"}
    figures.save_image(Image.new("L", (1, 1)), path)  # of a run whose last.pt is gone
    assert "--overwrite" in refused(flags(faces, tmp_path))


def test_the_config_of_another_program_is_not_written_over(faces, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"port": 8080}')
    assert f"{config}: not the config.json of a run" in refused(flags(faces, tmp_path))
    assert contents(tmp_path) == {"config.json": b'{"port": 8080}'}


def test_networks_of_another_factor_are_a_run_too(faces, tmp_path):
    torch.save({}, tmp_path / "netG_epoch_4_10.pth")
    assert "already holds a run" in refused(flags(faces, tmp_path))


@pytest.mark.parametrize("more", [["--config", "c.json"], ["--overwrite"]])
def test_flags_that_resume_would_not_heed_are_refused(run, more):
    assert "leave out --config and --overwrite" in refused(["--resume", "--out_dir", str(run),
                                                             *more])


def test_the_table_of_another_program_is_not_written_over(faces, tmp_path):
    for text in ("the user's", "Epoch,users\n1,2\n"):
        (tmp_path / "train_results.csv").write_text(text)
        assert "csv was not written by this project" in refused(flags(faces, tmp_path))
        assert (tmp_path / "train_results.csv").read_text() == text


def test_the_table_of_a_run_whose_networks_are_gone_is_kept(faces, run):
    for path in [*run.glob("*.p*"), *run.glob("samples/*")]:
        path.unlink()
    table = (run / "train_results.csv").read_bytes()
    assert "--overwrite" in refused(flags(faces, run))
    assert (run / "train_results.csv").read_bytes() == table


def test_flags_that_the_demo_would_not_heed_are_refused(tmp_path):
    message = refused(["--demo", "--out_dir", str(tmp_path), "--num_epochs", "1"])
    assert message.startswith("--demo: takes --out_dir and --device alone")
    assert not contents(tmp_path)


def test_a_run_in_a_folder_like_the_demos_is_none(tmp_path):
    args = train_identity.parse(["--train_dir", f"{tmp_path}/data/train", "--out_dir",
                                 str(tmp_path)])
    assert not demo.is_demo(args)
    args.face_weights = "random"
    assert demo.is_demo(args)
    args.train_dir = os.path.relpath(args.train_dir)  # as begun; resumed with the whole path
    assert demo.is_demo(args)


@pytest.mark.parametrize("main, argv", [(evaluate.main, []), (train_identity.main, [])])
def test_a_folder_that_cannot_be_is_named_before_the_work(main, argv, tmp_path, faces):
    (tmp_path / "file").write_text("mine")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refused([*argv, "--out_dir", str(out_dir)], main)
        assert message == (f"--out_dir {out_dir}: {tmp_path / 'file'} is no folder that may be "
                           "written to; choose another")


def test_a_generator_keeps_its_back_projection(run, capsys):
    message = refused(["--resume", "--out_dir", str(run), "--num_epochs", "3", "--without",
                       "back_projection"])
    assert message == (f"{run / 'last.pt'}: its generator has back-projection; leave it out of "
                       "--without")
    state = checkpoints.read_run(run)  # as one from before there was any
    del state["parts"]["netG"]["back_projection"]
    torch.save(state, run / "last.pt")
    message = refused(["--resume", "--out_dir", str(run), "--num_epochs", "3"])
    assert message.endswith("has no back-projection; add back_projection to --without")


def test_a_run_from_before_changes_were_noted_goes_on(run):
    state = checkpoints.read_run(run)
    del state["progress"]["changes"]
    checkpoints.save_torch(state, run / "last.pt")
    train_identity.main(["--resume", "--out_dir", str(run), "--num_epochs", "3"])
    changes = json.loads((run / "config.json").read_text())["changes"]
    assert changes == ["epoch 3: --num_epochs 2 -> 3"]


def test_flags_that_changed_on_the_way_are_kept(run, capsys):
    argv = ["--resume", "--out_dir", str(run), "--num_epochs"]
    train_identity.main([*argv, "3", "--lr", "1e-5"])
    train_identity.main([*argv, "4", "--device", "cpu"])
    changes = json.loads((run / "config.json").read_text())["changes"]
    assert changes == ["epoch 3: --lr 0.0004 -> 1e-05, --num_epochs 2 -> 3",
                       "epoch 4: --num_epochs 3 -> 4"]
    capsys.readouterr()
    train_identity.parse(["--config", str(run / "config.json")])
    run_folder.say_what_differs(run / "config.json", {"data": {}, "start": None})
    assert "only the last flags are repeated" in capsys.readouterr().out


def test_only_our_leftovers_go(run):
    ours = [".last.123.tmp.pt", ".netD_epoch_2_3.7.tmp.pth", "samples/.epoch_9.7.tmp.png"]
    users = [".notes.tmp.txt", ".notes.12.tmp.txt", "samples/.notes.tmp.png"]
    for name in ours + users:
        (run / name).touch()
    run_folder.open_run(train_identity.parse(["--resume", "--out_dir", str(run)]))
    assert [(run / name).exists() for name in ours] == [False] * 3
    assert all((run / name).exists() for name in users)


# ---------------------------------------------------------------------------------------------
# What must not be saved, what must be said


@pytest.mark.parametrize("poisoned, name", [("netG", "generator"), ("netD", "discriminator"),
                                            ("average", "generator's average")])
def test_batchnorm_statistics_count_as_weights(poisoned, name):
    trainer = SimpleNamespace(netG=Generator(2), average=Generator(2),
                              netD=torch.nn.BatchNorm2d(3))
    progress = {"epoch": 1, "step": 2}
    training_step.check_weights(trainer, progress)
    next(buffer for buffer in getattr(trainer, poisoned).buffers()).fill_(math.inf)
    with pytest.raises(InputError, match=f"epoch 1, step 2: .* of the {name} infinite or NaN"):
        training_step.check_weights(trainer, progress)


def test_a_run_that_shows_no_faces_warns(faces, tmp_path, monkeypatch, capsys):
    validate = train_identity.validate_epoch

    def dark(*args):
        return [part - np.array([100, 0, 0, 0, 0, 0]) for part in validate(*args)]

    monkeypatch.setattr(train_identity, "validate_epoch", dark)
    train_identity.main(flags(faces, tmp_path / "dark", "--num_epochs", "1"))
    assert "warning: epoch 1: -" in capsys.readouterr().out
    monkeypatch.setattr(train_identity, "validate_epoch", validate)
    train_identity.main(flags(faces, tmp_path / "light", "--num_epochs", "1"))
    assert "no picture of a face" not in capsys.readouterr().out


@pytest.mark.parametrize("load, flag", [("load_face_network", "--face_weights"),
                                        ("load_vgg", "--vgg_weights")])
def test_frozen_weights_that_are_nan_are_named(load, flag, tmp_path):
    import loss_identity
    network = getattr(loss_identity, load)("random")
    state = {f"features.{key}" if load == "load_vgg" else key: value
             for key, value in network.state_dict().items()}
    if load == "load_face_network":
        state = loss_identity.InceptionResnetV1().state_dict()
        state = {key: value for key, value in state.items() if not key.startswith("logits")}
    next(iter(state.values())).fill_(math.nan)
    torch.save(state, tmp_path / "sick.pt")
    with pytest.raises(InputError, match="sick.pt: holds NaN"):
        getattr(loss_identity, load)(str(tmp_path / "sick.pt"))


# ---------------------------------------------------------------------------------------------
# config.json and last.pt that were edited


ROW = dict.fromkeys(("Seconds", "Score_D", "Score_G", "Gradient_ratio", "D_updates"), 0.5)


def save_state(folder, **changed):
    """A last.pt without networks; `changed` in its progress."""
    checkpoints.save_run(folder, {}, {
        "epoch": 2, "step": 0, "updates": 3, "history": None, "rows": [ROW],
        "seconds": 0.0, "flags": {}, "changes": [], "start": None,
        "data": {"train_dir": "digest", "valid_dir": "digest"}} | changed)


@pytest.mark.parametrize("name, value", [
    ("batch_size", -2), ("batch_size", 2.5), ("batch_size", "two"), ("batch_size", True),
    ("batch_size", None), ("batch_size", [2]), ("seed", -1), ("seed", 2 ** 70),
    ("num_epochs", 0), ("crop_size", {}), ("lr", "1e-4"), ("lr", math.nan), ("lr", -1),
    ("gamma", math.inf), ("alpha", None), ("upscale_factor", 3), ("upscale_factor", "2"),
    ("crop", "left"), ("crop", None), ("without", "ema"), ("without", ["nothing"]),
    ("without", None), ("without", [["ema"]]), ("allow_overlap", 1), ("allow_overlap", "no"),
    ("train_dir", 3), ("train_dir", "a\0b"), ("start", 3), ("precision", "fp64"),
    ("pretrain_epochs", -1), ("cache_gb", "4"), ("device", 0)])
def test_an_edited_flag_is_named_with_its_file(finished, tmp_path, name, value):  # noqa: F811
    config = json.loads((finished / "config.json").read_text())
    config["flags"][name] = value
    save_state(tmp_path, flags=config["flags"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    for argv, file in ((["--config", str(tmp_path / "config.json")], "config.json"),
                       (["--resume", "--out_dir", str(tmp_path)], "last.pt")):
        assert f"{tmp_path / file}: {name} is " in refused(argv, train_identity.parse)


def test_good_flags_pass(finished, tmp_path):  # noqa: F811
    config = json.loads((finished / "config.json").read_text())
    config["flags"] |= {"alpha": 1, "start": None, "without": ["ema"]}  # JSON's 1 is 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = train_identity.parse(["--config", str(tmp_path / "config.json")])
    assert (args.alpha, args.start, args.without) == (1, None, ["ema"])


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"flags": 3}', '{"flags": [1]}',
                                  '{"flags": []}', '{"flags": [["lr", 1]]}', "[" * 99999,
                                  '{"flags": {"lr": 1e}}', "\udcff"])
def test_what_is_no_config_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert str(path) in refused(["--config", str(path)], train_identity.parse)


def test_a_config_that_is_a_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert "config.json" in refused(["--config", str(tmp_path / "config.json")])


@pytest.mark.parametrize("name, value", [
    ("epoch", "3"), ("epoch", 0), ("epoch", None), ("step", -1), ("step", 1.5), ("updates", None),
    ("history", [1]), ("history", torch.zeros(3)), ("rows", None), ("rows", [3]), ("rows", [{}]),
    ("rows", [ROW, ROW | {"Score_D": "1"}]),
    ("seconds", "1"), ("flags", None), ("flags", {3: 4}), ("start", 3), ("data", None),
    ("data", {"train_dir": 3}), ("changes", "none")])
def test_a_malformed_progress_is_named(tmp_path, name, value):
    save_state(tmp_path)
    run_folder.read_last(tmp_path)
    save_state(tmp_path, **{name: value})
    assert f"{tmp_path / 'last.pt'}: {name} is " in refused(["--resume", "--out_dir",
                                                             str(tmp_path)])


@pytest.mark.parametrize("name", ["epoch", "step", "updates", "history", "rows", "seconds",
                                  "flags", "data"])
def test_a_progress_that_lacks_something_is_named(tmp_path, name):
    save_state(tmp_path)
    state = checkpoints.read_run(tmp_path)
    del state["progress"][name]
    checkpoints.save_torch(state, tmp_path / "last.pt")
    assert f"{tmp_path / 'last.pt'}: {name} is None" in refused(tmp_path, run_folder.read_last)


def without_a_part(state):
    del state["parts"]["netG"]


def with_an_empty_part(state):
    state["parts"]["netG"] = {}


def with_nan(state):
    state["parts"]["netG"]["running_var"][0] = math.nan


def with_another_shape(state):
    state["parts"]["optimizerG"]["state"][0]["exp_avg"] = torch.zeros(2)


def with_another_schedule(state):
    state["parts"]["scheduleG"]["last_epoch"] = "3"


def with_another_rng(state):
    state["cpu_rng"] = torch.zeros(3)


def with_no_list(state):
    state["parts"]["optimizerG"] = [1]


@pytest.mark.parametrize("harm, part", [
    (lambda state: None, None), (without_a_part, "netG"), (with_an_empty_part, "netG"),
    (with_nan, "netG"), (with_another_shape, "optimizerG"), (with_another_schedule, "scheduleG"),
    (with_another_rng, "the random generators"), (with_no_list, "optimizerG")])
def test_a_part_that_does_not_fit_is_named(tmp_path, harm, part):
    network = nn.BatchNorm2d(3)
    optimizer = torch.optim.Adam(network.parameters())
    parts = {"netG": network, "optimizerG": optimizer,
             "scheduleG": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
             "scaler": torch.amp.GradScaler("cpu", enabled=False)}
    network(torch.rand(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    checkpoints.save_run(tmp_path, parts, {})
    state, path = checkpoints.read_run(tmp_path), tmp_path / "last.pt"
    harm(state)
    if part is None:
        checkpoints.restore_run(state, parts, path)
    else:
        message = refused(state, lambda state: checkpoints.restore_run(state, parts, path))
        assert message.startswith(f"{path}: {part} does not fit this run")


def test_a_run_without_its_generator_is_refused(run):
    state = checkpoints.read_run(run)
    del state["parts"]["netG"], state["parts"]["average"]
    checkpoints.save_torch(state, run / "last.pt")
    assert "netG does not fit this run" in refused(["--resume", "--out_dir", str(run)])


def test_a_history_of_another_width_begins_the_epoch_anew(faces, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt(patch, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_identity.main(flags(faces, tmp_path))
    state = checkpoints.read_run(tmp_path)
    state["progress"]["history"] = state["progress"]["history"][:, :5]
    checkpoints.save_torch(state, tmp_path / "last.pt")
    train_identity.main(["--resume", "--out_dir", str(tmp_path)])
    assert "begins anew" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Signals


def test_a_terminal_that_closes_saves_like_sigterm(faces, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may be around these tests
    try:
        with pytest.raises(SystemExit) as stop:
            train_identity.main(flags(faces, tmp_path))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stop.value.code == 128 + signal.SIGHUP and (tmp_path / "last.pt").exists()


def test_nohup_keeps_a_run_from_hanging_up():
    before = {number: signal.getsignal(number)
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run_folder.catch_signals(1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("script", ["train_identity", "evaluate", "prepare_celeba_hq",
                                    "super_resolve", "ablation", "benchmark"])
def test_ctrl_c_while_pytorch_is_imported_is_one_line(script):
    process = subprocess.Popen([sys.executable, "-v", ROOT / f"{script}.py", "--help"],
                               text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    next(line for line in process.stderr if line.startswith("import 'numpy'"))
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert error.endswith("error: stopped by Ctrl-C\n") and "Traceback" not in error


@pytest.mark.parametrize("more, said", [([], "error: stopped by Ctrl-C\n"),
                                        (["--multiprocessing-fork"], "")])
def test_of_several_processes_the_first_speaks_of_ctrl_c(more, said):
    command = "import support; support.stop_at_once(None, None)"
    done = subprocess.run([sys.executable, "-c", command, *more], cwd=ROOT, text=True,
                          capture_output=True)
    assert (done.returncode, done.stderr) == (130, said)


def test_ctrl_c_at_the_start_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 130 and capsys.readouterr().err == "error: stopped by Ctrl-C\n"


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory")])
def test_a_machine_without_memory_is_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--batch_size" in error and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--num_epoch", "--overw", "--res"])
def test_a_flag_is_written_out(flag, tmp_path):
    """A part of one would reach train_identity.py through ablation.py, which sets it itself."""
    with pytest.raises(InputError, match=f"unrecognized arguments: {flag}"):
        train_identity.parse([flag, "3"])


# ---------------------------------------------------------------------------------------------
# A fuzz of flags, config.json, last.pt and pictures: something usable, or one line


fuzz = hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None,
                           suppress_health_check=[*hypothesis.HealthCheck])
PARSERS = {"train": train_identity.parse, "evaluate": evaluate.parse}
NAMES = {"train": [*vars(train_identity.parse([]))], "evaluate": [*vars(evaluate.parse([]))]}
SWITCHES = {"resume", "overwrite", "demo", "allow_overlap"}
texts = st.text(st.characters(exclude_characters="\0"), max_size=12)  # no command line has \0
floats = st.floats(allow_subnormal=False)  # a run flushes them to 0, in the whole process
numbers = st.integers() | floats | st.sampled_from([-2, -1, 0, 1, 2 ** 31 - 1, 2 ** 31, 1e6])
values = st.recursive(st.none() | st.booleans() | numbers | st.text(max_size=12),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                          st.text(max_size=5), inner, max_size=3), max_leaves=5)


def check_usable(args):
    """Whatever a parser lets through must be something to compute with."""
    for name, value in vars(args).items():
        if isinstance(value, float):
            assert 0 <= value <= 1e30, name
        elif isinstance(value, int) and not isinstance(value, bool):
            low = 1 if name in ("batch_size", "num_epochs", "save_every") else 0
            assert low <= value < 2 ** 31, name
    if hasattr(args, "without"):
        assert set(args.without) <= set(train_identity.DEPARTURES)
        assert args.upscale_factor in (2, 4, 8) and args.crop in ("center", "random", "mixed")


def parsed(parse, argv):
    """What `parse` makes of a command line, or the line with which it is refused."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            check_usable(parse(argv))
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)


@fuzz
@hypothesis.given(st.sampled_from([*PARSERS]), st.data())
def test_fuzzed_flags(tmp_path_factory, monkeypatch, script, data):
    argv = []
    for name in data.draw(st.lists(st.sampled_from(NAMES[script]), max_size=4)):
        argv.append(f"--{name}" if name in SWITCHES else
                    f"--{name}={data.draw(texts | numbers.map(str))}")
    monkeypatch.chdir(tmp_path_factory.getbasetemp())  # there is nothing to resume
    parsed(PARSERS[script], argv)


@fuzz
@hypothesis.given(st.dictionaries(st.sampled_from(NAMES["train"]) | st.text(max_size=5), values,
                                  max_size=3), values, st.booleans())
def test_fuzzed_config(tmp_path_factory, flags, other, as_flags):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_text(json.dumps({"flags": flags} if as_flags else other))
    message = parsed(train_identity.parse, ["--config", str(path)])
    assert message is None or message.startswith(f"{path}: ")


@fuzz
@hypothesis.given(st.dictionaries(st.sampled_from([
    "epoch", "step", "updates", "history", "rows", "seconds", "flags", "start", "data"]), values,
    min_size=1, max_size=3))
def test_fuzzed_progress(tmp_path_factory, changed):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    save_state(folder, **changed)
    message = parsed(train_identity.parse, ["--resume", "--out_dir", str(folder)])
    assert message is None or message.startswith(f"{folder / 'last.pt'}: ")


def pictures():
    """One small picture as the bytes of each format and mode that a folder may hold."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    for kind, mode in (("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "1"),
                       ("PNG", "I;16"), ("WEBP", "RGBA"), ("BMP", "L"), ("TIFF", "LAB"),
                       ("TIFF", "F"), ("TIFF", "I"), ("TIFF", "YCbCr")):
        buffer = io.BytesIO()
        (picture.convert("L") if mode == "I;16" else picture).convert(mode).save(buffer, kind)
        yield buffer.getvalue()


@fuzz
@hypothesis.given(st.sampled_from([*pictures()]), st.data())
@pytest.mark.filterwarnings("ignore")  # Pillow's, about the files
def test_fuzzed_pictures(tmp_path_factory, content, data):
    start = data.draw(st.integers(0, len(content)))
    stop = start + data.draw(st.integers(0, 8))
    path = tmp_path_factory.getbasetemp() / "picture.png"
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=8)) + content[stop:])
    try:
        image = read_image(path)
        assert image.mode == "RGB" and min(image.size) > 0
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
