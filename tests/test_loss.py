"""loss_identity.py against numpy, closed forms and networks put together here."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from facenet_pytorch import InceptionResnetV1
from PIL import Image
from torch import nn

import loss_identity
from loss_identity import (
    GeneratorLoss,
    adversarial_loss,
    content_loss,
    embed,
    fake_loss,
    identity_loss,
    load_face_network,
    load_vgg,
    pixel_loss,
    real_loss,
)
from support.cli import InputError

BILINEAR = Image.Resampling.BILINEAR
FAKE = np.array([-1.3, 0.2, 2.0, -0.4])
REAL = np.array([0.7, -0.6, 1.9, 3.1])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float32) for a in arrays]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """torch's cache is an empty folder, and nothing comes from the network."""
    def no_network(url, dst, *args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)


# ---------------------------------------------------------------------------------------------
# The terms


@pytest.mark.parametrize("loss, shape", [(pixel_loss, (2, 3, 4, 5)), (content_loss, (2, 7, 2, 2)),
                                         (identity_loss, (3, 9))])
def test_mean_squared_errors(loss, shape):
    rng = np.random.default_rng(0)
    a, b = rng.random(shape), rng.random(shape)
    assert loss(*tensors(a, b)).item() == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2, np.pi])
def test_identity_loss_is_2_minus_2_cos_over_512(angle):
    sr, hr = np.zeros((1, 512)), np.zeros((1, 512))
    hr[0, 0] = 1
    sr[0, 0], sr[0, 7] = np.cos(angle), np.sin(angle)
    value = identity_loss(*tensors(sr, hr)).item()
    assert value == pytest.approx((2 - 2 * np.cos(angle)) / 512, rel=1e-4, abs=1e-9)


def generator_side(kind):
    if kind == "bce":
        return -np.log(sigmoid(FAKE)).mean()
    return 1 - sigmoid(FAKE).mean()


def discriminator_side(kind):
    if kind == "bce":
        return -np.log(sigmoid(REAL)).mean() - np.log(1 - sigmoid(FAKE)).mean()
    return 1 - sigmoid(REAL).mean() + sigmoid(FAKE).mean()  # the report's 1 - D(x) + D(G(z))


@pytest.mark.parametrize("kind", ["bce", "linear"])
def test_adversarial_losses(kind):
    fake, real = tensors(FAKE, REAL)
    assert adversarial_loss(kind, fake).item() == pytest.approx(generator_side(kind), 1e-5)
    both = real_loss(kind, real) + fake_loss(kind, fake)
    assert both.item() == pytest.approx(discriminator_side(kind), 1e-5)


@pytest.mark.parametrize("kind", ["bce", "linear"])
def test_adversarial_losses_pull_in_opposite_directions(kind):
    fake, real = (x.requires_grad_() for x in tensors(FAKE, REAL))
    assert torch.autograd.grad(adversarial_loss(kind, fake), fake)[0].sum() < 0
    assert torch.autograd.grad(fake_loss(kind, fake), fake)[0].sum() > 0
    assert torch.autograd.grad(real_loss(kind, real), real)[0].sum() < 0


def test_cross_entropy_stays_finite_where_a_sigmoid_would_not():
    fake, real = tensors(np.array([-300.0]), np.array([300.0]))
    assert adversarial_loss("bce", fake).item() == pytest.approx(300)
    assert fake_loss("bce", -fake).item() == pytest.approx(300)
    assert real_loss("bce", -real).item() == pytest.approx(300)


@pytest.mark.parametrize("loss", [
    lambda a, b: pixel_loss(a, b), lambda a, b: content_loss(a, b),
    lambda a, b: identity_loss(a, b), lambda a, b: adversarial_loss("bce", a),
    lambda a, b: adversarial_loss("linear", a), lambda a, b: real_loss("bce", a),
    lambda a, b: real_loss("linear", a), lambda a, b: fake_loss("bce", a),
    lambda a, b: fake_loss("linear", a)])
def test_losses_of_bf16_are_computed_in_fp32(loss):
    a, b = torch.randn(2, 7).bfloat16()
    value = loss(a, b)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(a.double(), b.double()).item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------
# L_total, with frozen networks small enough to compute by hand


class Features(nn.Module):
    """A 1x1 convolution in VGG's place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.requires_grad_(False)

    def forward(self, x):
        return self.conv(x)


class Embedder(nn.Module):
    """A linear map of the mean colour, as a unit vector, in the face network's place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5, bias=False)
        self.requires_grad_(False)

    def forward(self, x):
        assert x.shape[1:] == (3, 160, 160)
        return F.normalize(self.linear(x.mean((2, 3))))


def small_loss(alpha=0.3, beta=0.05, gamma=0.7, **options):
    torch.manual_seed(0)
    return GeneratorLoss(alpha, beta, gamma, Features(), Embedder(), **options)


def total_and_terms(loss, sr, hr):
    """(L_total, {term: value}), D's logits of SR being FAKE."""
    content, identity = loss.perceptual(sr, loss.targets(hr))
    terms = {"pixel": loss_identity.pixel_loss(sr, hr), "content": content, "identity": identity,
             "adversarial": loss_identity.adversarial_loss(loss.gan_loss, *tensors(FAKE))}
    return loss.total(terms), terms


@pytest.mark.parametrize("gan_loss", ["bce", "linear"])
def test_total_is_the_reports_sum(gan_loss):
    loss = small_loss(gan_loss=gan_loss)
    rng = np.random.default_rng(1)
    sr, hr = rng.random((2, 2, 3))  # two images each, of one colour
    images = [c[..., None, None].expand(2, 3, 8, 8) for c in tensors(sr, hr)]
    total, terms = total_and_terms(loss, *images)

    conv = loss.vgg.conv.weight[:, :, 0, 0].numpy().astype(float)
    linear = loss.face_network.linear.weight.numpy().astype(float)
    vectors = [(2 * c - 1) @ linear.T for c in (sr, hr)]
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    expected = {"pixel": ((sr - hr) ** 2).mean(), "content": (((sr - hr) @ conv.T) ** 2).mean(),
                "identity": ((a - b) ** 2).mean(), "adversarial": generator_side(gan_loss)}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name
    assert total.item() == pytest.approx(
        expected["pixel"] + 0.3 * expected["content"] + 0.05 * expected["adversarial"]
        + 0.7 * expected["identity"], rel=1e-5)


def test_a_term_of_weight_0_needs_no_network():
    loss = GeneratorLoss(0, 0.5, 0, None, None)
    sr, hr = torch.rand(2, 2, 3, 4, 4)
    total, terms = total_and_terms(loss, sr, hr)
    assert terms["content"] == 0 and terms["identity"] == 0
    expected = (sr - hr).square().mean().item() + 0.5 * generator_side("bce")
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_presets_are_the_reports():
    assert loss_identity.PRESETS == {"baseline": (0.006, 0.001, 0), "visual": (0.006, 0.001, 0.006),
                                     "identity": (0.005, 0.001, 0.6)}


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.3, 0), (0, 0.7)])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_perceptual_gradient_in_chunks_is_that_of_the_whole(weights, chunk):
    loss = small_loss(weights[0], 0, weights[1])
    sr, hr = torch.rand(2, 5, 3, 6, 6)
    targets = loss.targets(hr)
    whole = sr.clone().requires_grad_()
    content, identity = loss.perceptual(whole, targets)
    expected, = torch.autograd.grad(weights[0] * content + weights[1] * identity, whole)
    for scale in (1, 1024):
        gradient, *values = loss.perceptual_gradient(sr, targets, chunk, scale)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(torch.stack(values), torch.stack([content, identity]).detach())


def test_perceptual_gradient_survives_fp16_by_its_scale():
    loss = small_loss(1e-6, 0, 0)
    sr, hr = torch.rand(2, 2, 3, 8, 8)
    targets = loss.targets(hr)
    expected, _, _ = loss.perceptual_gradient(sr, targets, 2)
    with torch.autocast("cpu", torch.float16):
        lost, _, _ = loss.perceptual_gradient(sr, targets, 2)
        kept, _, _ = loss.perceptual_gradient(sr, targets, 2, scale=2.0 ** 20)
    assert not lost.any()
    torch.testing.assert_close(kept, expected, rtol=0.05, atol=expected.abs().max().item() / 100)


# ---------------------------------------------------------------------------------------------
# The frozen networks


def vgg_by_hand():
    """VGG16's convolutions by their published table, in torchvision's numbering."""
    layers, c_in = [], 3
    for c_out in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()] if c_out else [nn.MaxPool2d(2)]
        c_in = c_out or c_in
    network = nn.Sequential(*layers)
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    return network


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """(an fp16 file of features.*, the network it was made of in the same numbers)."""
    torch.manual_seed(0)
    network = vgg_by_hand().half().float()
    path = tmp_path_factory.mktemp("vgg") / "mine.pth"
    torch.save({f"features.{k}": v.half() for k, v in network.state_dict().items()}
               | {"classifier.0.bias": torch.zeros(3).half()}, path)
    return path, network


@pytest.fixture(scope="module")
def random_networks():
    return load_vgg("random"), load_face_network("random")


def test_vgg_needs_only_features_and_says_stand_in_of_fp16(vgg_file, monkeypatch):
    path, network = vgg_file

    def no_classifier(*args, **kwargs):
        raise AssertionError("a fully connected layer was built")

    monkeypatch.setattr(nn.Linear, "__init__", no_classifier)
    vgg = load_vgg(str(path))
    assert all(p.dtype == torch.float32 for p in vgg.parameters())
    assert "stand-in" in vgg.label and "mine.pth" in vgg.label
    images = torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        output = vgg(images)
        torch.testing.assert_close(output, network(images), rtol=1e-3, atol=1e-3)
    assert output.shape == (2, 512, 2, 1) and output.std() > 0.01


def test_a_file_in_torchs_cache_is_taken_from_there(vgg_file, tmp_path):
    path = tmp_path / "home" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    path.symlink_to(vgg_file[0])
    vgg = load_vgg("imagenet")
    assert vgg.label == "imagenet, stand-in"
    torch.testing.assert_close(vgg[0].weight, vgg_file[1][0].weight, rtol=0, atol=0,
                               check_stride=False)


def test_folded_face_network_is_the_published_one(tmp_path):
    torch.manual_seed(0)
    network = InceptionResnetV1().eval()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.1, 0.4)
            nn.init.uniform_(module.weight, 0.8, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    path = tmp_path / "face.pt"
    torch.save(network.state_dict() | {"logits.weight": torch.zeros(9, 512),
                                       "logits.bias": torch.zeros(9)}, path)
    folded = load_face_network(str(path))
    assert folded.label == "face.pt"  # fp32: no stand-in
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    images = torch.rand(2, 3, 8, 8)
    images[1] *= 0.3
    faces = F.interpolate(images, (160, 160), mode="bilinear", align_corners=False) * 2 - 1
    with torch.no_grad():
        expected, actual = network(faces), embed(folded, images)
    assert expected.std(0).max() > 5e-3  # the two faces do differ
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(actual.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("height, width", [(24, 40), (160, 160), (256, 256), (250, 120),
                                           (120, 250)])
def test_faces_are_resized_as_by_pillow(height, width):
    """To 160 px and [-1, 1]; what is larger is averaged, not sampled."""
    images = torch.rand(2, 3, height, width)
    faces = embed(lambda faces: faces, images)
    expected = [[np.asarray(Image.fromarray(channel).resize((160, 160), BILINEAR))
                 for channel in image] for image in images.numpy()]
    np.testing.assert_allclose(faces, 2 * np.array(expected) - 1, atol=1e-5)


def test_targets_are_no_part_of_a_graph(random_networks):
    loss = GeneratorLoss(1.0, 1.0, 1.0, *random_networks)
    hr = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not any(target.requires_grad for target in loss.targets(hr))


def test_gradients_reach_sr_only(random_networks):
    vgg, face_network = random_networks
    loss = GeneratorLoss(1.0, 1.0, 1.0, vgg, face_network)
    torch.manual_seed(0)
    sr, hr = (torch.rand(1, 3, 32, 32, requires_grad=True) for _ in range(2))
    parameters = [*vgg.parameters(), *face_network.parameters()]
    weights = [p.clone() for p in parameters]
    _, terms = total_and_terms(loss, sr, hr)
    for name in ("content", "identity"):  # each by itself, so that neither hides the other
        sr.grad = None
        terms[name].backward()
        assert sr.grad.abs().max() > 0 and hr.grad is None
    for network in (vgg, face_network):
        assert not any(module.training for module in network.modules())
    assert all(p.grad is None and not p.requires_grad for p in parameters)
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights))


@pytest.mark.parametrize("load, flag", [(load_vgg, "--vgg_weights"),
                                        (load_face_network, "--face_weights")])
def test_random_is_seeded_and_announced(load, flag, random_networks, capsys):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    network = load("random")
    torch.testing.assert_close(torch.rand(3), expected)  # the run's own numbers are untouched
    first = random_networks[load is load_face_network]
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), first.parameters()))
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and flag in output and "mean nothing" in output
    assert network.label == "random"


def test_features_of_a_random_vgg_are_of_the_pictures_size(random_networks):
    """He et al.'s start; PyTorch's own lets them fade by a thousand on their way."""
    with torch.no_grad():
        assert 0.01 < random_networks[0](torch.rand(1, 3, 64, 64)).std() < 1


@pytest.mark.parametrize("load, weights, file, flag", [
    (load_vgg, "imagenet", "hub/checkpoints/vgg16-397923af.pth", "--vgg_weights"),
    (load_face_network, "vggface2", "checkpoints/20180402-114759-vggface2.pt", "--face_weights"),
    (load_face_network, "casia-webface", "checkpoints/20180408-102900-casia-webface.pt",
     "--face_weights"),
])
def test_a_failed_download_says_what_belongs_where(load, weights, file, flag, tmp_path):
    with pytest.raises(InputError) as error:
        load(weights)
    message = str(error.value)
    assert "\n" not in message
    for part in (file.split("/")[-1], str(tmp_path / "home" / file), flag, "no route to host"):
        assert part in message


@pytest.mark.parametrize("load, flag", [(load_vgg, "--vgg_weights"),
                                        (load_face_network, "--face_weights")])
def test_files_that_are_no_weights_are_refused_by_name(load, flag, tmp_path):
    def refused(path):
        with pytest.raises(InputError, match="w.pth") as error:
            load(str(path))
        assert "\n" not in str(error.value)
        return str(error.value)

    path = tmp_path / "w.pth"
    assert flag in refused(path)  # missing
    path.write_bytes(b"<html>404</html>")
    message = refused(path)
    assert flag in message and "weights_only" not in message  # no advice to load it anyway
    torch.save([1, 2], path)
    assert flag in refused(path)
    torch.save({"somebody.else": torch.zeros(2)}, path)
    refused(path)
    torch.save({f"features.{i}.weight": torch.zeros(100, 100) for i in range(9)}, path)
    path.write_bytes(path.read_bytes()[:5000])
    assert flag in refused(path)
