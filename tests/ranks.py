"""What test_train.py has two processes compute; of the forkserver that tests/preloaded.py fills."""

import contextlib
import multiprocessing
import os
import random
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train_identity
import training_step
from support import run_folder
from support.machine import set_up_machine

CPU = torch.device("cpu")


def forkserver():
    """A context whose processes start with all imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def on_two_ranks(function, *arguments):
    """function(rank, *arguments) in two processes that torch.distributed can join."""
    port = random.randint(20000, 40000)
    processes = [forkserver().Process(target=as_rank, args=(rank, port, function, *arguments))
                 for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]


def as_rank(rank, port, function, *arguments):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(rank, *arguments)


def step_of_ranks(ranks, world, without, device=CPU):
    """(trainer, logged values) after a step on the four images that each of `ranks` has."""
    args = train_identity.parse(
        ["--crop_size", "32", "--batch_size", "4", "--alpha", "0", "--beta", "0.1", "--gamma", "3",
         "--face_weights", "random", "--precision", "fp32", "--device", device.type, "--without",
         *without])
    trainer = training_step.build_trainer(args, device, 1, world)
    trainer.netG.train()
    trainer.netD.train()
    if world > 1:
        trainer.sent = []
        trainer.ddpD.register_comm_hook(None, lambda _, bucket: (
            trainer.sent.append(bucket.buffer().numel()), allreduce_hook(None, bucket))[1])
    shares = [torch.Generator().manual_seed(one) for one in ranks]
    lr, hr = (torch.cat([torch.rand(4, 3, side, side, generator=share) for share in shares])
              .to(device) for side in (4, 32))
    values = training_step.train_step(trainer, lr, hr, trainer.loss.targets(hr), True, True)
    return trainer, dict(zip(training_step.LOGGED, values.tolist()))


def save_step(rank, folder, without, device="cpu"):
    """The gradients of both networks, and how many of D's were exchanged."""
    device, _, _ = set_up_machine(device)
    trainer, logged = step_of_ranks([rank], 2, without, device)
    torch.save({"netG": [p.grad for p in trainer.netG.parameters()],
                "netD": [p.grad for p in trainer.netD.parameters()],
                "logged": logged, "sent": sum(trainer.sent)}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def train(rank, argv):
    train_identity.main(argv)


def train_and_save_always(argv):
    """A run that writes last.pt after every step."""
    run_folder.SAVE_MINUTES = 0
    train_identity.main(argv)


def train_whole_and_stopped(rank, argv, folder):
    """One run in one go, then one that rank 1 is told to stop in mid-epoch, and its resumption.

    In the first only rank 0's clock finds it time to save.
    """
    run_folder.SAVE_MINUTES = 1000 if rank else 0
    train_identity.main([*argv, "--out_dir", f"{folder}/whole"])
    run_folder.SAVE_MINUTES = 10
    original, count = train_identity.apply_updates, [0]

    def apply_updates(trainer, with_gan):
        count[0] += 1
        if rank == 1 and count[0] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        original(trainer, with_gan)

    train_identity.apply_updates = apply_updates
    for more in (argv, ["--resume"]):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        with contextlib.suppress(SystemExit):
            train_identity.main([*more, "--out_dir", f"{folder}/stopped"])
