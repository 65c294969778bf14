"""model.py against closed forms and the definitions of its layers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from model import (
    Discriminator,
    Generator,
    UpsampleBlock,
    back_project,
    probability,
    remove_stripes_,
)
from support.fast_layers import PReLU, SubPixelConv2d
from support.machine import autocast, fast_precision


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_generator_enlarges_by_its_factor_into_0_1(factor):
    torch.manual_seed(0)
    generator = Generator(factor).eval()
    with torch.no_grad():
        generator.last.weight.mul_(1e4)  # far into both ends of the tanh
        sr = generator(torch.rand(2, 3, 5, 7))
    assert generator.scale_factor == factor
    assert sr.shape == (2, 3, 5 * factor, 7 * factor)
    assert sr.min() >= 0 and sr.max() <= 1 and sr.min() < 0.01 and sr.max() > 0.99


def test_generator_ends_in_a_tanh_brought_to_0_1():
    generator = Generator(2, back_projection=False).eval()
    with torch.no_grad():
        generator.last.weight.zero_()
        generator.last.bias.copy_(torch.tensor([-0.5, 0.0, 2.0]))
        sr = generator(torch.rand(1, 3, 4, 4))
    expected = (1 + torch.tensor([-0.5, 0.0, 2.0]).tanh()) / 2
    torch.testing.assert_close(sr, expected[None, :, None, None].expand_as(sr))


def resized(images, width, height):
    """Pillow's bicubic resampling of floats: (N, 3, H, W) -> (N, 3, height, width)."""
    return torch.stack([torch.stack([
        torch.from_numpy(np.array(Image.fromarray(channel.numpy()).resize((width, height),
                                                                          Image.BICUBIC)))
        for channel in image]) for image in images])


def test_back_projection_by_pillow():
    torch.manual_seed(0)
    sr, lr = 0.4 + 0.2 * torch.rand(2, 3, 40, 48), 0.4 + 0.2 * torch.rand(2, 3, 5, 6)
    expected = sr + resized(lr - resized(sr, 6, 5), 48, 40)
    torch.testing.assert_close(back_project(sr, lr), expected, rtol=0, atol=1e-6)
    # a wrong colour is put right, and what LR cannot tell stays
    flat = torch.full((1, 3, 5, 6), 0.3)
    lines = torch.tensor([0.1, -0.1]).repeat(24).expand(1, 3, 40, 48)
    torch.testing.assert_close(back_project(torch.full_like(lines, 0.5) + lines, flat),
                               0.3 + lines, rtol=0, atol=5e-3)
    assert back_project(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 1, 1), 2.0)).max() == 1


def test_a_generator_projects_back_where_its_state_dict_says_so():
    torch.manual_seed(0)
    plain, corrected = Generator(4, back_projection=False).eval(), Generator(4).eval()
    assert corrected.state_dict().keys() - plain.state_dict().keys() == {"back_projection"}
    corrected.load_state_dict(plain.state_dict(), strict=False)
    lr = torch.rand(2, 3, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(corrected(lr), back_project(plain(lr), lr))


def test_recomputed_upsampling_changes_neither_output_nor_gradients():
    torch.manual_seed(0)
    generator, lr = Generator(4), torch.rand(5, 3, 6, 6)
    results = []
    for checkpoint_chunk in (None, 2):
        generator.zero_grad()
        sr = generator(lr, checkpoint_chunk)
        sr.square().mean().backward()
        results.append([sr.detach()] + [p.grad for p in generator.parameters()])
    for kept, recomputed in zip(*results):
        torch.testing.assert_close(recomputed, kept, rtol=1e-4, atol=1e-6)


def test_parameter_counts():
    assert parameters(Generator(8)) == 881_932
    # a sub-pixel block less: its 3x3 convolution from 64 to 256 channels, biases and one PReLU
    block = 256 * 64 * 9 + 256 + 1
    assert parameters(Generator(4)) == 881_932 - block
    assert parameters(Generator(2)) == 881_932 - 2 * block
    assert parameters(Discriminator()) == 5_215_425


@pytest.mark.parametrize("factor", [0, 1, 3, 6, -2])
def test_other_factors_are_refused(factor):
    with pytest.raises(ValueError, match=str(factor)):
        Generator(factor)


@pytest.mark.parametrize("size", [(16, 16), (20, 33)])
def test_discriminator_gives_one_logit_per_image(size):
    torch.manual_seed(0)
    discriminator = Discriminator().eval()
    with torch.no_grad():
        logits = discriminator(torch.rand(3, 3, *size))
        discriminator.classifier[-1].bias += 50
        shifted = discriminator(torch.rand(1, 3, *size))
    assert logits.shape == (3,) and shifted.shape == (1,)
    assert shifted.item() > 40  # not squashed by a sigmoid


def test_probability_is_the_sigmoid():
    logits = torch.tensor([-3.0, 0.0, 1.5])
    torch.testing.assert_close(probability(logits), 1 / (1 + (-logits).exp()))


def test_sub_pixel_convolution_is_the_convolution_after_the_shuffle():
    torch.manual_seed(0)
    layer = SubPixelConv2d(5, 3, 9, padding=4).double()
    x = torch.randn(2, 20, 3, 4, dtype=torch.double, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    expected = F.conv2d(F.pixel_shuffle(x, 2), layer.weight, layer.bias, padding=4)
    actual = layer(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(torch.autograd.grad(actual, inputs, upstream),
                            torch.autograd.grad(expected, inputs, upstream)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("slope", [0.25, -0.5, 1.5])
def test_the_activation_is_a_prelu(slope):
    """Against the definition: x where it is positive, else slope times x; by hand, in double."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    x[0, 0, 0, 0] = 0
    x.requires_grad_()
    upstream = torch.randn_like(x)
    activation = PReLU().double()
    with torch.no_grad():
        activation.weight.fill_(slope)
    y = activation(x)
    of_x, of_slope = torch.autograd.grad(y, (x, activation.weight), upstream)
    negative = (x <= 0).detach()
    torch.testing.assert_close(y, torch.where(negative, slope * x, x))
    torch.testing.assert_close(of_x, torch.where(negative, slope * upstream, upstream))
    torch.testing.assert_close(of_slope, (upstream * x)[negative].sum().detach()[None])


def test_the_activation_keeps_the_precision_of_autocast():
    activation = PReLU()
    with torch.autocast("cpu", torch.bfloat16):
        y = activation(torch.full((1, 2, 4, 4), -1.0).bfloat16().requires_grad_())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and activation.weight.grad.dtype == torch.float32
    assert activation.weight.grad.item() == -32


@pytest.mark.parametrize("has, precision, dtype", [
    ({"amx_bf16": True, "avx512_bf16": True}, "bf16", torch.bfloat16),
    ({"amx_bf16": False, "avx512_bf16": True}, "bf16", torch.bfloat16),
    ({"amx_bf16": False, "avx512_bf16": False}, "fp32", torch.float32)])
def test_a_cpu_computes_in_bf16_where_it_has_units_for_it(has, precision, dtype, monkeypatch):
    cpu, ones = torch.device("cpu"), torch.ones(1, 1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert fast_precision(cpu) == precision
    with autocast(cpu, precision)():
        assert (ones @ ones).dtype == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older PyTorch
    assert fast_precision(cpu) == "fp32"


def test_sr_is_fp32_under_autocast():
    """bf16 cannot tell 0.5 from 0.501: pictures would be posterised."""
    torch.manual_seed(0)
    netG, lr = Generator(2), torch.rand(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        sr = netG(lr)
    assert sr.dtype == torch.float32
    assert (sr != sr.bfloat16()).float().mean() > 0.5


def test_the_activation_commutes_with_the_shuffle():
    torch.manual_seed(0)
    block = UpsampleBlock(4)
    x = torch.randn(2, 4, 3, 5)
    expected = block.prelu(F.pixel_shuffle(block.conv(x), 2))
    torch.testing.assert_close(F.pixel_shuffle(block(x), 2), expected)


def cells(images):
    """(N, C, 2H, 2W) -> (N, C, H, W, 4), the four pixels of every 2x2 cell."""
    return torch.stack([images[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=-1)


def test_icnr_starts_as_a_nearest_neighbour_upsampling():
    torch.manual_seed(0)
    x = torch.randn(1, 64, 4, 5)
    with torch.no_grad():
        for block in Generator(8).upsample:
            output = cells(F.pixel_shuffle(block(x), 2))
            torch.testing.assert_close(output, output[..., :1].expand_as(output))
            assert output.std() > 0.1  # of something, not of nothing
        plain = cells(F.pixel_shuffle(Generator(8, icnr=False).upsample[0](x), 2))
    assert (plain - plain[..., :1]).abs().max() > 0.1


def test_without_stripes_no_input_makes_the_last_convolution_draw_a_line_pattern():
    """A line pattern of period two averages to zero against +1, -1, +1, ... along an axis."""
    torch.manual_seed(0)
    weight = torch.randn(3, 4, 9, 9)
    x = torch.zeros(1, 4, 40, 40)
    x[..., 12:28, 12:28] = torch.randn(1, 4, 16, 16)  # all of the response lies inside
    signs = (-1.0) ** torch.arange(40)

    def stripes(kernel):
        y = F.conv2d(x, kernel, padding=4)
        return [(y * signs).sum(-1).abs().max(), (y * signs[:, None]).sum(-2).abs().max()]

    assert min(stripes(weight)) > 10
    cleaned = weight.clone()
    remove_stripes_(cleaned)
    assert max(stripes(cleaned)) < 1e-3
    again = cleaned.clone()
    remove_stripes_(again)
    torch.testing.assert_close(again, cleaned)


def test_a_kernel_behind_a_2x2_mean_has_no_stripes_to_remove():
    torch.manual_seed(0)
    kernel = torch.randn(5, 1, 8, 8)
    behind_mean = F.conv_transpose2d(kernel, torch.full((1, 1, 2, 2), 0.25))
    cleaned = behind_mean.clone()
    remove_stripes_(cleaned)
    torch.testing.assert_close(cleaned, behind_mean)
