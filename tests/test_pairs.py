"""Recognition against another photograph: LFW's protocol by hand and brute force, drawn people."""

import os
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TinyFaces
from PIL import Image
from torch import nn

import evaluate
from support import statistics, tables, verification
from support.cli import InputError
from support.portraits import LIGHT, _portrait, repeated_portraits, synthetic_portraits
from support.verification import pair_rates, read_pairs, recognition, similarity

# ---------------------------------------------------------------------------------------------
# Several comparisons


def test_holm_by_hand():
    """Smallest p times 4, the next times 3, ...; never below one that came before."""
    corrected = statistics.holm([0.04, 0.01, np.nan, 0.03, 0.02])
    np.testing.assert_allclose(corrected, [0.06, 0.04, np.nan, 0.06, 0.06])
    np.testing.assert_allclose(statistics.holm([0.7, 0.6]), [1, 1])
    assert statistics.holm([]).shape == (0,)


def test_the_p_value_agrees_with_the_interval_and_with_the_normal_one_of_many_values():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(200)
    noise = (noise - noise.mean()) / noise.std()
    for shift, z in ((0.05, 0.707), (0.16, 2.263), (-0.2, -2.828), (0, 0)):
        values = noise + shift  # z = shift * sqrt(200)
        p = statistics.p_value(values)
        expected = 2 * (1 - torch.distributions.Normal(0, 1).cdf(torch.tensor(abs(z))).item())
        assert p == pytest.approx(expected, abs=0.02)
        low, high = statistics.bootstrap(values)
        assert (p < 0.05) == (low > 0 or high < 0)
    assert statistics.p_value(np.zeros(5)) == 1
    assert 0 < statistics.p_value(np.ones(50)) < 0.001


@pytest.mark.parametrize("values", [[0.1], [1, 1, 1, 1, 1], [3, 1, -2, 0.5, 4, 2],
                                    [0.21, 0.94, 0.37, 0.11, 0.63, 0.93]])
def test_the_p_value_of_few_values_is_that_of_all_signs(values):
    values = np.array(values)
    means = [abs(np.mean(values * signs)) for signs in product((-1, 1), repeat=len(values))]
    expected = np.mean([mean >= abs(values.mean()) - 1e-12 for mean in means])
    assert statistics.p_value(values) == pytest.approx(expected, abs=0.02)
    assert np.isnan(statistics.bootstrap(values[:1])).all()  # one value shows no spread


def test_few_values_of_noise_are_seldom_a_finding():
    """A bootstrap finds one in 15 % of all cases of five values, in half of all cases of two."""
    rng = np.random.default_rng(0)
    for n in (2, 5, 12):
        found = [statistics.p_value(rng.standard_normal(n), resamples=1000) < 0.05
                 for _ in range(300)]
        assert np.mean(found) < 0.08


# ---------------------------------------------------------------------------------------------
# Rates


def test_similarities_by_definition():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 5)), rng.standard_normal((4, 5))
    cosines, distances = similarity(a, b), similarity(a, b, by_distance=True)
    for i, j in np.ndindex(3, 4):
        assert cosines[i, j] == pytest.approx(a[i] @ b[j] / np.sqrt(a[i] @ a[i] * (b[j] @ b[j])))
        assert distances[i, j] == pytest.approx(-np.sqrt(((a[i] - b[j]) ** 2).sum()))
    for by_distance, whole in ((False, cosines), (True, distances)):
        np.testing.assert_allclose(similarity(a, b[:3], by_distance, paired=True),
                                   np.diag(whole[:, :3]))


def rates_by_force(genuine, impostors, far):
    """(AUC, TAR) over all pairs and every possible threshold."""
    auc = np.mean([(g > i) + (g == i) / 2 for g in genuine for i in impostors])
    tar = max(np.mean(genuine > t) for t in impostors if np.mean(impostors > t) <= far)
    return auc, tar


def test_weights_are_repetitions():
    """A person drawn twice brings each pair twice, and pairs with oneself are no impostors."""
    rng = np.random.default_rng(0)
    genuine, impostors = rng.normal(1, 1, 30).round(1), rng.normal(0, 1, 200).round(1)
    of_genuine, of_impostors = rng.integers(0, 3, 30), rng.integers(0, 4, 200)
    verify = verification.verification(genuine, impostors, (0.01, 0.1))
    plain = verify(np.ones(30, int), np.ones(200, int))
    drawn = verify(of_genuine, of_impostors)
    repeated = np.repeat(genuine, of_genuine), np.repeat(impostors, of_impostors)
    for k, far in enumerate((0.01, 0.1)):
        assert [plain[0], plain[1 + k]] == pytest.approx(rates_by_force(genuine, impostors, far))
        assert [drawn[0], drawn[1 + k]] == pytest.approx(rates_by_force(*repeated, far))
    assert np.isnan(verify(np.zeros(30, int), np.ones(200, int))).all()


def test_intervals_by_force():
    """Every draw of people written out: those drawn twice bring their pairs twice."""
    rng, n = np.random.default_rng(3), 12
    scores = rng.normal(0, 1, (n, n)) + np.eye(n)
    rng, drawn = np.random.default_rng(7), []
    for _ in range(60):
        who = rng.integers(n, size=n)
        impostors = np.array([scores[a, b] for a in who for b in who if a != b])
        rank = np.array([(scores[a] > scores[a, a]).sum() for a in who])  # the gallery stays
        drawn.append([(rank < 1).mean(), (rank < 5).mean(),
                      *rates_by_force(scores[who, who], impostors, 0.1)])
    rates = recognition(scores, fars=(0.1,), seed=7, resamples=60)
    bounds = np.percentile(drawn, [2.5, 97.5], axis=0).T
    for (_, low, high), expected in zip(rates.values(), bounds):
        assert (low, high) == pytest.approx(tuple(expected))


def test_intervals_of_rank1_are_the_binomial_ones():
    """40 people, 30 recognised: Binomial(40, 3/4) / 40."""
    scores = np.eye(40) + np.where(np.arange(40) < 10, 2, 0)[:, None] * (1 - np.eye(40))
    value, low, high = recognition(scores, resamples=4000)["rank1"]
    assert value == 0.75
    spread = 1.96 * np.sqrt(0.75 * 0.25 / 40)
    assert (low, high) == pytest.approx((0.75 - spread, 0.75 + spread), abs=0.026)


def test_the_interval_of_the_auc_covers_new_samples():
    """Of 40 people each: the interval holds the true rate about as often as it promises."""
    rng, hits = np.random.default_rng(0), 0
    truth, n = 0.7603, 60  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for seed in range(n):
        scores = rng.standard_normal((40, 40)) + np.eye(40)
        _, low, high = recognition(scores, seed=seed, resamples=200)["auc"]
        hits += low <= truth <= high
    assert 0.85 <= hits / n <= 1


def test_several_probes_of_a_person_count_as_one_draw():
    """Ten people with twenty equal probes each: as uncertain as ten probes, not as two hundred."""
    hit = np.arange(10) < 5
    one = np.where(np.eye(10, dtype=bool), 1.0, np.where(hit, 0, 2)[:, None])
    many = np.repeat(one, 20, axis=0)
    a, b = recognition(one), recognition(many, np.repeat(np.arange(10), 20))
    assert a["rank1"] == pytest.approx(b["rank1"]) and a["rank1"][2] - a["rank1"][1] > 0.4
    assert a["auc"] == pytest.approx(b["auc"]) and a["auc"][2] - a["auc"][1] > 0.4


def test_accuracy_over_folds_by_force():
    rng = np.random.default_rng(0)
    people = rng.integers(0, 30, (400, 2))
    people[::2, 1] = people[::2, 0]
    is_genuine, fold = people[:, 0] == people[:, 1], np.arange(400) // 40
    scores = (rng.standard_normal(400) + 1.5 * is_genuine).round(2)
    accuracy = []
    for k in range(10):
        rest, here = fold != k, fold == k
        candidates = np.unique(scores[rest])
        candidates = np.concatenate([[-9], (candidates[1:] + candidates[:-1]) / 2, [9]])
        best = max(candidates, key=lambda t: np.mean((scores[rest] > t) == is_genuine[rest]))
        accuracy.append(np.mean((scores[here] > best) == is_genuine[here]))
    rates = pair_rates(scores, people, fold)
    value, low, high = rates["accuracy"]
    assert value == pytest.approx(np.mean(accuracy)) and low < value < high
    auc, tar = rates_by_force(scores[is_genuine], scores[~is_genuine], 0.01)
    assert rates["auc"][0] == pytest.approx(auc)
    assert rates["tar_at_far_1"][0] == pytest.approx(tar)
    assert set(rates) == {"accuracy", "auc", "tar_at_far_1", "tar_at_far_0.1"}


def test_the_threshold_is_not_of_the_fold_that_it_decides():
    """Fold 1 has all scores 10 higher: the others' threshold accepts all of its pairs."""
    people = np.array([[0, 0], [0, 1]] * 6)
    fold = np.repeat([0, 0, 1], 4)
    scores = np.array([1.0, 0.0] * 6) + 10 * (fold == 1)
    right = verification.decided_right(scores, people[:, 0] == people[:, 1], fold)
    assert right[fold == 1].tolist() == [True, False] * 2


def test_an_embedding_that_is_none_decides_its_pair_wrong():
    people, fold = np.array([[0, 0], [0, 1]] * 20), np.arange(40) // 4
    scores = np.array([1.0, 0.0] * 20)
    assert pair_rates(scores, people, fold)["accuracy"][0] == 1
    scores[:2] = np.nan
    assert pair_rates(scores, people, fold)["accuracy"][0] == pytest.approx(38 / 40)


# ---------------------------------------------------------------------------------------------
# pairs.txt


GOOD = "2\t1\nA\t1\t2\nA\t1\tB\t3\nB\t3\t4\n\nB\t1\tA\t2\n"


def test_a_list_of_pairs_is_read(tmp_path):
    (tmp_path / "pairs.txt").write_text(GOOD)
    assert read_pairs(tmp_path / "pairs.txt") == [
        (0, ("A", 1), ("A", 2)), (0, ("A", 1), ("B", 3)),
        (1, ("B", 3), ("B", 4)), (1, ("B", 1), ("A", 2))]


@pytest.mark.parametrize("text, said", [
    ("", "first line"), ("500\n", "first line"), ("1\t1\nA\t1\t2\nA\t1\tB\t3\n", "first line"),
    ("01\t1\nA\t1\t2\nA\t1\tB\t3\n", "first line"),
    (GOOD + "A\t1\t2\n", "5 pairs.*2 x 2 x 1"), (GOOD.replace("A\t1\t2", "A\t1"), "line 2.*name 1"),
    (GOOD.replace("A\t1\tB\t3", "A\t1\tA\t3"), "line 3.*other"),
    (GOOD.replace("B\t3\t4", "B\t3\tx"), "line 4")])
def test_a_bad_list_is_named_with_its_line(tmp_path, text, said):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(InputError, match=f"--pairs .*{said}") as error:
        read_pairs(tmp_path / "pairs.txt")
    assert "\n" not in str(error.value)


def test_a_missing_list_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="--pairs .*pipe.txt: no text"):
        read_pairs(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="--pairs .*none.txt: No such file"):
        read_pairs(tmp_path / "none.txt")


# ---------------------------------------------------------------------------------------------
# The script, on drawn people


def test_drawn_people_are_those_of_the_portraits_elsewhere():
    pictures = repeated_portraits(2, 3, 64, seed=4)
    assert pictures.shape == (2, 3, 64, 64, 3) and pictures.dtype == np.uint8
    assert all((pictures[0, i] != pictures[0, j]).mean() > 0.3 for i, j in ((0, 1), (1, 2)))
    np.testing.assert_array_equal(pictures, repeated_portraits(2, 3, 64, seed=4))
    identity = np.random.default_rng(4).random(32)
    np.testing.assert_array_equal(_portrait(identity, 64), synthetic_portraits(1, 64, 4)[0])
    identity[LIGHT] = 0.5  # no light from a side: the background's corners are alike
    straight = _portrait(identity, 64)
    np.testing.assert_array_equal(straight[0, 0], straight[0, -1])


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A folder per person, four drawn photographs in each, and a pairs.txt of two folds."""
    folder = tmp_path_factory.mktemp("people")
    for i, shots in enumerate(repeated_portraits(8, 4, 64, seed=0)):
        name = f"Person_{i}"
        (folder / "faces" / name).mkdir(parents=True)
        for k, shot in enumerate(shots, 1):
            Image.fromarray(shot).save(folder / "faces" / name / f"{name}_{k:04d}.png")
    lines = ["2\t12"]
    for fold in range(2):
        who = [4 * fold + i for i in range(4)]
        lines += [f"Person_{i}\t{k}\t{k + 1}" for i in who for k in (1, 2, 3)]
        lines += [f"Person_{i}\t{k}\tPerson_{who[(n + k) % 4]}\t{k}"
                  for n, i in enumerate(who) for k in (1, 2, 3)]
    (folder / "pairs.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(evaluate, "load_face_network", lambda _: TinyFaces())


def test_the_script_on_drawn_people(people, tmp_path, tiny, capsys):
    out = tmp_path / "out"
    evaluate.main(["--data_dir", str(people / "faces"), "--pairs", str(people / "pairs.txt"),
                   "--gallery", str(people / "faces"), "--crop_size", "0", "--device", "cpu",
                   "--out_dir", str(out)])
    text = (out / "people.md").read_text()
    assert text in capsys.readouterr().out and "## gallery, whole_frames, cosine" in text
    table = pd.read_csv(out / "people.csv").set_index(["protocol", "model"])
    assert (table.loc["pairs", "n"] == 48).all() and (table.loc["gallery", "n"] == 24).all()

    # HR against HR, from the pictures alone
    def embedding(name, number):
        picture = np.array(Image.open(people / "faces" / name / f"{name}_{number:04d}.png"))
        return evaluate.embed(TinyFaces(), torch.tensor(picture).permute(2, 0, 1)[None] / 255)[0]

    pairs = read_pairs(people / "pairs.txt")
    scores = np.array([float(embedding(*a) @ embedding(*b)) for _, a, b in pairs])
    of_one = np.array([a[0] == b[0] for _, a, b in pairs])
    auc, tar = rates_by_force(scores[of_one], scores[~of_one], 0.01)
    assert table.loc[("pairs", "HR"), "auc"] == pytest.approx(auc, abs=1e-4)
    assert table.loc[("pairs", "HR"), "tar_at_far_1"] == pytest.approx(tar)
    first = torch.stack([embedding(f"Person_{i}", 1) for i in range(8)])
    found = [(first @ embedding(f"Person_{i}", k)).argmax().item() == i
             for i in range(8) for k in (2, 3, 4)]
    assert table.loc[("gallery", "HR"), "rank1"] == pytest.approx(np.mean(found))
    assert 1 / 8 < np.mean(found)
    for rate in ("accuracy", "auc", "tar_at_far_0.1"):
        low, value, high = (table.loc["pairs", f"{rate}{end}"] for end in ("_low", "", "_high"))
        assert ((low <= value) & (value <= high)).all()


def test_the_first_picture_of_a_pair_is_the_restored_one():
    """Probes of the model, references of HR: with the other way round nobody is recognised."""
    people = np.repeat(np.arange(6), 2)
    references = np.eye(6)[people]
    probes = references.copy()
    probes[1::2] = -1  # the second pictures are restored badly, and are nobody's probe
    pairs = np.array([[2 * i, 2 * i + 1] for i in range(6)]
                     + [[2 * i, (2 * i + 3) % 12] for i in range(6)])
    rates = evaluate.score_pairs(probes, references, False, pairs, people[pairs],
                                 np.arange(12) % 3, 0)
    assert rates["accuracy"][0] == 1 and rates["n"] == 12


def test_what_a_judge_of_distances_does_not_see_is_left_out():
    person = np.repeat(np.arange(4), 3)
    references = np.eye(4)[person]
    references[[0, 4, 9, 10, 11]] = np.nan  # a gallery face, a probe, a whole person
    rates = evaluate.score_gallery(references, references, True, person, 0)
    assert rates["n"] == 12 - 5 - 3 and rates["rank1"][0] == 1
    pairs = np.array([[1, 2], [0, 1], [6, 7], [2, 6], [7, 1], [4, 5]])
    rates = evaluate.score_pairs(references, references, True, pairs, person[pairs],
                                 np.arange(6) % 2, 0)
    assert rates["n"] == 4 and rates["auc"][0] == 1
    with pytest.raises(InputError, match="--judge dlib"):
        evaluate.score_pairs(references, references, True, pairs[:1], person[pairs][:1],
                             np.zeros(1), 0)
    references[2:] = np.nan  # of nobody two photographs
    with pytest.raises(InputError, match="--judge dlib: finds no person's face in two"):
        evaluate.score_gallery(references[1:], references[1:], True, person[1:], 0)


def test_people_of_whom_no_pair_is_left_are_not_drawn(monkeypatch):
    person = np.repeat(np.arange(6), 2)
    references = np.eye(6)[person]
    references[[2, 3, 6, 7]] = np.nan
    pairs = np.array([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [0, 4], [8, 10]])
    drawn = []
    monkeypatch.setattr(evaluate, "pair_rates", lambda scores, people, fold, seed: (
        drawn.append(people.tolist()) or {}))
    evaluate.score_pairs(references, references, True, pairs, person[pairs], np.arange(8) % 2, 0)
    assert drawn == [[[0, 0], [1, 1], [2, 2], [3, 3], [0, 1], [2, 3]]]


def test_a_large_gallery_does_not_take_hours(monkeypatch):
    asked = []
    monkeypatch.setattr(verification, "with_intervals",
                        lambda names, rates, n, seed, resamples: asked.append(resamples))
    for n in (100, 1200, 3000):
        recognition(np.zeros((n, n), np.float16))
    assert asked[0] == 1000 and asked[2] == 200 < asked[1] < 1000


def test_people_that_cannot_be_compared_are_named(people, tmp_path, tiny):
    rest = ["--device", "cpu", "--out_dir", str(tmp_path / "out"), "--crop_size", "0"]
    bad = tmp_path / "pairs.txt"
    bad.write_text("2 1\nPerson_0 1 9\nPerson_0 1 Person_1 1\nPerson_1 1 2\nPerson_1 1 Person_0 1")
    with pytest.raises(InputError, match="1 of its photographs.*Person_0/Person_0_0009"):
        evaluate.main(["--data_dir", str(people / "faces"), "--pairs", str(bad), *rest])
    bad.write_text("2 1\nNobody 1 2\nPerson_0 1 Person_1 1\nPerson_1 1 2\nPerson_1 1 Person_0 1")
    with pytest.raises(InputError, match="2 of its photographs are not in .*: Nobody/Nobody_0001"):
        evaluate.main(["--data_dir", str(people / "faces"), "--pairs", str(bad), *rest])
    bad.write_text(bad.read_text().replace("Nobody", "sub/Person_0"))
    with pytest.raises(InputError, match="2 of its photographs are not in .*: sub/Person_0/"):
        evaluate.main(["--data_dir", str(people / "faces"), "--pairs", str(bad), *rest])
    with pytest.raises(InputError, match="--gallery .*no such folder"):
        evaluate.main(["--gallery", str(tmp_path / "no"), *rest])
    with pytest.raises(InputError, match="--crop_size: takes 264 px"):
        evaluate.main(["--gallery", str(people / "faces"), *rest[:-1], "264"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "people.csv").write_text("the user's")
    with pytest.raises(InputError, match="people.csv was not written by this project"):
        evaluate.main(["--gallery", str(people / "faces"), *rest[:2], "--out_dir",
                       str(tmp_path / "mine")])
    for i in range(3):
        (tmp_path / "single" / str(i)).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "single" / str(i) / "a.png")
    with pytest.raises(InputError, match="--gallery .*two or more photographs of somebody"):
        evaluate.main(["--gallery", str(tmp_path / "single"), *rest])
    (tmp_path / "single" / "empty").mkdir()
    with pytest.raises(InputError, match="single/empty: no photograph in it; --gallery must hold"):
        evaluate.main(["--gallery", str(tmp_path / "single"), *rest])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--shift", "1"], ["--scale", "0.5"], ["--restored", "a=b"]])
def test_what_people_are_not_measured_with_is_refused(people, tmp_path, tiny, more):
    with pytest.raises(InputError, match=f"{more[0]}: leave it out beside --gallery"):
        evaluate.main(["--gallery", str(people / "faces"), "--device", "cpu", "--out_dir",
                       str(tmp_path / "out"), *more])


def test_results_lie_among_the_photographs_of_neither(people, tmp_path, tiny):
    with pytest.raises(InputError, match="lies in --data_dir .*among photographs"):
        evaluate.main(["--data_dir", str(people / "faces"), "--pairs", str(people / "pairs.txt"),
                       "--gallery", str(tmp_path), "--out_dir", str(people / "faces" / "out")])


def test_a_crop_below_the_factor_is_no_whole_frame(people, tmp_path, tiny):
    with pytest.raises(InputError, match="--crop_size 4: must be 8 or more, or 0 for whole frames"):
        evaluate.main(["--gallery", str(people / "faces"), "--crop_size", "4", "--device", "cpu",
                       "--out_dir", str(tmp_path / "out")])


def test_each_metric_is_corrected_by_itself():
    pairs = pd.DataFrame({"metric": ["ssim", "cosine"] * 2, "p": [0.01, 0.02, 0.03, 0.04]})
    assert tables.correct(pairs)["p_holm"].tolist() == [0.02, 0.04, 0.03, 0.04]


def test_each_fold_counts_alike():
    """Two folds of eight pairs, all decided right, and one of two, both wrong: 2/3, not 16/18."""
    people = np.array([[0, 0], [0, 1]] * 9)
    fold = np.repeat([0, 1, 2], [8, 8, 2])
    scores = np.array([1.0, 0.0] * 8 + [0.0, 1.0])
    assert pair_rates(scores, people, fold, resamples=10)["accuracy"][0] == pytest.approx(2 / 3)


def test_intervals_of_pairs_by_force():
    """A person drawn twice brings each own pair twice; with one drawn thrice it is six times."""
    rng = np.random.default_rng(0)
    people = rng.integers(0, 12, (120, 2))
    people[::2, 1] = people[::2, 0]
    is_genuine, fold = people[:, 0] == people[:, 1], np.arange(120) % 4
    scores = rng.standard_normal(120) + is_genuine
    right = verification.decided_right(scores, is_genuine, fold)
    rng, drawn = np.random.default_rng(5), []
    for _ in range(60):
        who = rng.integers(12, size=12).tolist()
        times = np.array([who.count(a) * (1 if a == b else who.count(b)) for a, b in people])
        genuine, impostors = (np.repeat(scores[kind], times[kind])
                              for kind in (is_genuine, ~is_genuine))
        drawn.append([np.repeat(right, times).mean(), *rates_by_force(genuine, impostors, 0.1)])
    rates = pair_rates(scores, people, fold, (0.1,), seed=5, resamples=60)
    for (_, low, high), expected in zip(rates.values(),
                                        np.percentile(drawn, [2.5, 97.5], axis=0).T):
        assert (low, high) == pytest.approx(tuple(expected))


def test_equal_scores_are_not_told_apart():
    """All pairs are alike and most are genuine: the best that a threshold can do is accept all."""
    assert verification.best_threshold(np.ones(5), np.arange(5) > 1) < 1


def test_probes_of_a_gallery_are_restored_and_its_faces_are_not():
    person = np.repeat(np.arange(6), 2)
    references, probes = np.eye(6)[person], np.eye(6)[person]
    probes[::2], references[1::2] = -1, -1  # the gallery's restored, the probes' HR: nobody's
    assert evaluate.score_gallery(probes, references, False, person, 0)["rank1"][0] == 1


def test_bicubic_probes_are_compared_with_hr(people, tmp_path, tiny):
    """The restored picture of the first of a pair, HR of the second; by Pillow alone."""
    evaluate.main(["--data_dir", str(people / "faces"), "--pairs", str(people / "pairs.txt"),
                   "--gallery", str(people / "faces"), "--crop_size", "0", "--device", "cpu",
                   "--out_dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "people.csv").set_index(["protocol", "model"])

    def embedding(name, number, restored):
        image = Image.open(people / "faces" / name / f"{name}_{number:04d}.png")
        if restored:
            image = image.resize((8, 8), Image.BICUBIC).resize((64, 64), Image.BICUBIC)
        pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255
        return evaluate.embed(TinyFaces(), pixels)[0]

    pairs = read_pairs(people / "pairs.txt")
    scores = np.array([float(embedding(*a, True) @ embedding(*b, False)) for _, a, b in pairs])
    of_one = np.array([a[0] == b[0] for _, a, b in pairs])
    auc, _ = rates_by_force(scores[of_one], scores[~of_one], 0.01)
    assert table.loc[("pairs", "bicubic"), "auc"] == pytest.approx(auc, abs=1e-4)
    first = torch.stack([embedding(f"Person_{i}", 1, False) for i in range(8)])
    found = [(first @ embedding(f"Person_{i}", k, True)).argmax().item() == i
             for i in range(8) for k in (2, 3, 4)]
    assert table.loc[("gallery", "bicubic"), "rank1"] == pytest.approx(np.mean(found))


class Redness(nn.Module):
    """In dlib's place: descriptors of one direction, whose lengths alone tell people apart."""

    def forward(self, pictures, hr):
        return pictures.mean((2, 3))[:, :1]


def test_dlib_recognises_by_distance(people, tmp_path, tiny, monkeypatch):
    """By cosine all would be alike."""
    monkeypatch.setattr(evaluate, "load_judge", lambda name: Redness())
    evaluate.main(["--data_dir", str(people / "faces"), "--pairs", str(people / "pairs.txt"),
                   "--gallery", str(people / "faces"), "--crop_size", "0", "--device", "cpu",
                   "--judge", "dlib", "--out_dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "people.csv").set_index(["protocol", "judge", "model"])

    def red(name, number):
        path = people / "faces" / name / f"{name}_{number:04d}.png"
        return np.asarray(Image.open(path))[..., 0].mean() / 255

    pairs = read_pairs(people / "pairs.txt")
    scores = np.array([-abs(red(*a) - red(*b)) for _, a, b in pairs])
    of_one = np.array([a[0] == b[0] for _, a, b in pairs])
    auc, _ = rates_by_force(scores[of_one], scores[~of_one], 0.01)
    assert table.loc[("pairs", "distance_dlib", "HR"), "auc"] == pytest.approx(auc, abs=1e-3)
    assert auc > 0.6
    first = np.array([red(f"Person_{i}", 1) for i in range(8)])
    found = [np.abs(first - red(f"Person_{i}", k)).argmin() == i
             for i in range(8) for k in (2, 3, 4)]
    assert table.loc[("gallery", "distance_dlib", "HR"), "rank1"] == pytest.approx(np.mean(found))
    assert np.mean(found) > 1 / 8
