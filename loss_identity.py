"""The report's losses.

    L_total = L_pixel + alpha * L_content + beta * L_GAN + gamma * L_identity

`GeneratorLoss.total` is that line. Training needs only its gradient at SR, and takes the part of
the two frozen networks a few images at a time (`perceptual_gradient`): the same sum in a fraction
of the memory.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from facenet_pytorch import InceptionResnetV1
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers

from support.checkpoints import all_finite, read_state
from support.cli import InputError

# The report's weightings (alpha, beta, gamma) of its "Results Summary".
PRESETS = {
    "baseline": (0.006, 0.001, 0.0),
    "visual": (0.006, 0.001, 0.006),
    "identity": (0.005, 0.001, 0.6),
}

FACENET = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
FACE_URLS = {
    "vggface2": FACENET + "20180402-114759-vggface2.pt",
    "casia-webface": FACENET + "20180408-102900-casia-webface.pt",
}
RANDOM_SEED = 0  # of the networks that `random` asks for: the same ones in every run


# ---------------------------------------------------------------------------------------------
# The four terms


def pixel_loss(sr, hr):
    """L_pixel: mean squared error of two image batches (N, 3, H, W) in [0, 1] -> scalar."""
    return F.mse_loss(sr.float(), hr.float())


def content_loss(sr_features, hr_features):
    """L_content: mean squared error of two VGG feature maps (N, 512, h, w) -> scalar."""
    return F.mse_loss(sr_features.float(), hr_features.float())


def identity_loss(sr_embeddings, hr_embeddings):
    """L_identity: mean squared error of unit embeddings (N, 512) -> scalar.

    Equals (2 - 2 cos) / 512 for a pair: a cosine error of 0.15 is 0.0006.
    """
    return F.mse_loss(sr_embeddings.float(), hr_embeddings.float())


def adversarial_loss(kind, fake_logits):
    """L_GAN, the generator's side; logits (N,) of D(G(z)) -> scalar.

    bce: -log D(G(z)) (Ledig et al., eq. 6, as a mean). linear: 1 - D(G(z)), the report's published
    code, whose gradient vanishes wherever D is sure.
    """
    fake = fake_logits.float()
    return F.softplus(-fake).mean() if kind == "bce" else (1 - torch.sigmoid(fake)).mean()


def real_loss(kind, real_logits):
    """The discriminator's loss on real images; logits (N,) of D(x) -> scalar.

    bce: -log D(x). linear: 1 - D(x), the report's published code. Its whole loss is this plus
    `fake_loss`.
    """
    real = real_logits.float()
    return F.softplus(-real).mean() if kind == "bce" else (1 - torch.sigmoid(real)).mean()


def fake_loss(kind, fake_logits):
    """The discriminator's loss on generated images; logits (N,) of D(G(z)) -> scalar.

    bce: -log(1 - D(G(z))). linear: D(G(z)), the report's published code.
    """
    fake = fake_logits.float()
    return F.softplus(fake).mean() if kind == "bce" else torch.sigmoid(fake).mean()


# ---------------------------------------------------------------------------------------------
# The frozen networks


def load_vgg(weights):
    """VGG16's `features[:31]`: images (N, 3, H, W) in [0, 1] -> (N, 512, H/32, W/32).

    `weights`: imagenet, random or a state dict's path; only `features.*` is read. Frozen, eval
    mode. `.label` says what was loaded. Raises InputError if the weights cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        network = make_layers(cfgs["D"], batch_norm=False)  # its features[:31], no classifier
        for layer in network:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if weights == "random":
        return _frozen(network, _announce_random("VGG16", "--vgg_weights"))
    url = VGG16_Weights.IMAGENET1K_V1.url if weights == "imagenet" else None
    folder = Path(torch.hub.get_dir(), "checkpoints")
    state, source = _load_state(weights, url, folder, "--vgg_weights")
    features = {k.removeprefix("features."): v for k, v in state.items()
                if k.startswith("features.")}
    _fill(network, features, source, "VGG16's features.* (torchvision layout)")
    return _frozen(network, _label(weights, features))


def load_face_network(weights, flag="--face_weights"):
    """InceptionResnetV1: faces (N, 3, 160, 160) in [-1, 1] -> unit embeddings (N, 512).

    `weights`: vggface2, casia-webface, random or a state dict's path. Frozen, eval mode, each
    BatchNorm folded into its convolution (the same function, a third fewer passes over memory).
    `.label` says what was loaded. Raises InputError naming `flag` if that fails.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        network = InceptionResnetV1().eval()
    if weights == "random":
        label = _announce_random("InceptionResnetV1", flag)
    else:
        folder = Path(os.path.dirname(torch.hub.get_dir()), "checkpoints")  # facenet-pytorch's
        state, source = _load_state(weights, FACE_URLS.get(weights), folder, flag)
        state = {k: v for k, v in state.items() if not k.startswith("logits.")}
        _fill(network, state, source, "InceptionResnetV1 (facenet-pytorch layout)")
        label = _label(weights, state)
    for module in network.modules():
        if hasattr(module, "conv") and hasattr(module, "bn"):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return _frozen(network, label)


def embed(face_network, images):
    """Images (N, 3, H, W) in [0, 1] -> unit face embeddings (N, 512), differentiable.

    What is larger than the network's 160 px is reduced with antialiasing.
    """
    faces = F.interpolate(images, size=(160, 160), mode="bilinear", align_corners=False,
                          antialias=max(images.shape[-2:]) > 160)
    return face_network(faces * 2 - 1)


def cast_once(network, dtype):
    """Hold a frozen network's convolutions and matrices in `dtype`, that of autocast, in place.

    Autocast would cast these weights anew at every call. The result is the same to the bit, but
    without autocast such a network no longer runs.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)


def _frozen(network, label):
    network.label = label
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _announce_random(name, flag):
    print(f"{name}: seeded random weights ({flag} random); a smoke test, its numbers mean nothing")
    return "random"


def _label(weights, state):
    """What a figure measured with these weights has to say of them."""
    # The official files are fp32; this project's stand-ins have their names and layout in fp16.
    half = any(v.dtype == torch.float16 for v in state.values())
    return f"{Path(weights).name}, stand-in" if half else Path(weights).name


def _load_state(weights, url, folder, flag):
    """(state dict, path it came from): from torch's cache, a download into it, or a local file."""
    path = folder / os.path.basename(url) if url else Path(weights)
    if url and not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
        except Exception as error:  # urllib, sockets, SSL, a full disk: all end the same way
            raise InputError(f"{flag} {weights}: could not download {path.name} ({error}); fetch "
                             f"{url} elsewhere and put it at {path}") from None
    try:
        state = read_state(path)
    except InputError as error:
        advice = "remove that file, to download it anew" if url else "name another copy"
        raise InputError(f"{flag} {weights}: {error}; {advice}") from None
    return state, path


def _fill(network, state, source, what):
    try:
        network.load_state_dict(state)  # copies into fp32, whatever the file holds
    except RuntimeError:
        raise InputError(f"{source}: does not hold {what}") from None
    if not all_finite(network):
        raise InputError(f"{source}: holds NaN or infinite weights; take another copy")


# ---------------------------------------------------------------------------------------------
# L_total


class GeneratorLoss:
    """L_total = L_pixel + alpha L_content + beta L_GAN + gamma L_identity.

    `vgg` and `face_network` are frozen (`load_vgg`, `load_face_network`); either may be None where
    its weight is 0. `gan_loss` is the kind of `adversarial_loss`.
    """

    def __init__(self, alpha, beta, gamma, vgg, face_network, gan_loss="bce"):
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.vgg, self.face_network = vgg, face_network
        self.gan_loss = gan_loss

    @torch.no_grad()
    def targets(self, hr):
        """What content and identity compare SR with: (VGG features, embeddings) of HR."""
        return (self.vgg(hr) if self.alpha else None,
                embed(self.face_network, hr) if self.gamma else None)

    def perceptual(self, sr, targets):
        """(L_content, L_identity) of SR against `targets(hr)`; a term of weight 0 is 0."""
        features, embeddings = targets
        zero = sr.new_zeros(())
        return (content_loss(self.vgg(sr), features) if self.alpha else zero,
                identity_loss(embed(self.face_network, sr), embeddings) if self.gamma else zero)

    def total(self, terms):
        """L_total of {"pixel", "content", "adversarial", "identity": value}."""
        return (terms["pixel"] + self.alpha * terms["content"]
                + self.beta * terms["adversarial"] + self.gamma * terms["identity"])

    def perceptual_gradient(self, sr, targets, chunk, scale=1.0):
        """Gradient of alpha L_content + gamma L_identity at SR, `chunk` images at a time.

        Both frozen networks treat each image by itself, so the chunks add up to the whole exactly
        while only one chunk's activations are alive. `scale` (of a GradScaler) is applied on the
        way through them and taken out again: in fp16 gradients of this size vanish.
        -> (gradient like sr, content, identity).
        """
        gradient, values = torch.empty_like(sr), sr.new_zeros(2)
        for start in range(0, len(sr), chunk):
            part = slice(start, start + chunk)
            image = sr[part].detach().requires_grad_()
            content, identity = self.perceptual(
                image, [None if t is None else t[part] for t in targets])
            share = len(image) / len(sr)  # each term is a mean over the batch
            loss = share * (self.alpha * content + self.gamma * identity)
            at_image, = torch.autograd.grad(loss * scale, image)
            gradient[part] = at_image / scale
            values += share * torch.stack([content.detach(), identity.detach()])
        return gradient, *values
