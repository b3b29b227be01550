"""Preprocessing of images: equal to Pillow, torch and transformers; its gradient; the kernel."""

from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastgrpo_kernels import preprocess_images
from fastgrpo_kernels.preprocess_images import (
    _preprocess_images_backward_triton,
    _preprocess_images_triton,
    preprocess_images_backward_reference,
    preprocess_images_reference,
)
from tests.kernels.parameters import ALL_CHECKS, BACKEND, DEVICES, DTYPES, QUICK_CHECKS, covering

Match = Literal["pil", "torch"]
MATCHES: list[Match] = ["pil", "torch"]
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
BYTES: dict[str, Any] = {"low": 0.0, "high": 255.0, "mean": [0.0] * 3, "std": [1 / 255] * 3}
# of sums of up to 60 products; half-precision results may differ by one rounding
TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-5},
}
# height x width of an image, of what it becomes, and of the crop
SIZES = [
    ((1, 1), (1, 1), (1, 1)),
    ((1, 9), (5, 3), (5, 3)),
    ((32, 32), (32, 32), (32, 32)),
    ((40, 40), (33, 33), (33, 33)),
    ((20, 31), (33, 40), (31, 17)),
    ((150, 70), (19, 36), (18, 33)),
    ((64, 300), (16, 20), (16, 16)),
]
Size = tuple[int, int]


def make_images(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Noise that leaves [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    return (2.4 * torch.rand(shape, generator=generator) - 1.2).to(device, dtype)


def make_bytes(height: int, width: int, seed: int = 0) -> np.ndarray:
    """[H, W, 3]: noise, or black and white, which overshoots most."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return pixels if seed % 2 == 0 else np.where(pixels > 127, np.uint8(255), np.uint8(0))


def to_images(pixels_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float()


def pillow(pixels_HWC: np.ndarray, height: int, width: int) -> Tensor:
    resized = Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling.BICUBIC)
    return to_images(np.array(resized))


def columns_first(size: Size, resized: Size) -> bool:
    """Pillow 13 orders its two roundings by this rule; all before it, and we, begin with the rows."""
    return size[0] - resized[0] > 2 * max(size[1] - resized[1], 0)


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((512, 512), (224, 224)),
        ((1024, 1024), (224, 224)),
        ((600, 512), (262, 224)),
        ((64, 64), (224, 224)),
        ((300, 200), (300, 77)),
        ((77, 300), (500, 300)),
        ((2, 3), (301, 290)),
        ((900, 1100), (7, 5)),
    ],
    ids=str,
)
def test_pil_equals_pillow_in_every_byte(size: Size, resized: Size) -> None:
    for seed in (0, 1):
        pixels_HWC = make_bytes(*size, seed=seed)
        result = preprocess_images(to_images(pixels_HWC), resize=resized, **BYTES)
        assert torch.equal(result.round(), pillow(pixels_HWC, *resized))


SIDE = st.integers(1, 90)


@given(size=st.tuples(SIDE, SIDE), resized=st.tuples(SIDE, SIDE), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_pil_equals_pillow_at_any_size(size: Size, resized: Size, seed: int) -> None:
    assume(not columns_first(size, resized))
    pixels_HWC = make_bytes(*size, seed=seed)
    result = preprocess_images(to_images(pixels_HWC), resize=resized, **BYTES)
    assert torch.equal(result.round(), pillow(pixels_HWC, *resized))


@pytest.mark.parametrize("image", ["grace_hopper.jpg", "Minduka_Present_Blue_Pack.png"])
def test_equals_transformers_clip_processor_on_a_photograph_and_a_drawing(image: str) -> None:
    picture = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / image).convert("RGB")
    processor = CLIPImageProcessorPil()
    expected = processor(images=picture, return_tensors="pt").pixel_values
    images = to_images(np.array(picture)) / 127.5 - 1
    result = preprocess_images(images, resize=224, crop=(224, 224), mean=processor.image_mean, std=processor.image_std)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "resized"),
    [((512, 512), (224, 224)), ((64, 64), (224, 224)), ((150, 70), (19, 36)), ((7, 300), (33, 300))],
    ids=str,
)
def test_torch_equals_interpolate_in_values_and_gradients(size: Size, resized: Size) -> None:
    images = make_images(2, 3, *size).requires_grad_()
    std_C11, mean_C11 = torch.tensor(STD)[:, None, None].double(), torch.tensor(MEAN)[:, None, None].double()
    exact = F.interpolate(((images.double() + 1) / 2), resized, mode="bicubic", antialias=True)
    expected = (exact - mean_C11) / std_C11
    result = preprocess_images(images, resize=resized, mean=MEAN, std=STD, match="torch")
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=3e-6)
    # its float32 path rounds the weights' arguments to float32
    in_float32 = F.interpolate((images + 1) / 2, resized, mode="bicubic", antialias=True)
    torch.testing.assert_close(result * std_C11.float() + mean_C11.float(), in_float32, rtol=0, atol=2e-5)
    weight = make_images(*result.shape)
    (grad,), (grad_expected,) = (torch.autograd.grad((y * weight).sum(), images) for y in (result, expected))
    torch.testing.assert_close(grad, grad_expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("match", MATCHES)
def test_gradient_is_the_adjoint_of_the_linear_map(match: Match, device: str) -> None:
    images, step = make_images(2, 3, 45, 31, device=device), make_images(2, 3, 45, 31, device=device).flip(2)
    arguments: dict[str, Any] = {"resize": 20, "crop": (16, 20), "mean": MEAN, "std": STD}
    result = preprocess_images(images.requires_grad_(), match=match, **arguments)
    weight = make_images(*result.shape, device=device)
    (grad,) = torch.autograd.grad((result * weight).sum(), images)
    before, after = (preprocess_images(x.detach(), match="torch", **arguments) for x in (images, images + step))
    torch.testing.assert_close((grad * step).sum(), ((after - before) * weight).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sizes", "match", "dtype"), covering(SIZES, MATCHES, DTYPES), ids=str)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernel_equals_reference(
    sizes: tuple[Size, Size, Size], match: str, dtype: torch.dtype, kernel_device: str
) -> None:
    size, resized, crop = sizes
    images = make_images(2, 1, *size, dtype=dtype, device=kernel_device)
    arguments = (images, list(resized), list(crop), -1.0, 1.0, MEAN[:1], STD[:1], match, dtype, False)
    result, expected = _preprocess_images_triton(*arguments), preprocess_images_reference(*arguments)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, **({"rtol": 0, "atol": 0} if match == "pil" else TOLERANCES[dtype]))


@pytest.mark.parametrize(("sizes", "dtype"), covering(SIZES, DTYPES, together=1), ids=str)
@pytest.mark.usefixtures("poisoned_outputs")
def test_backward_kernel_equals_reference(
    sizes: tuple[Size, Size, Size], dtype: torch.dtype, kernel_device: str
) -> None:
    size, resized, crop = sizes
    grad = make_images(1, 2, *crop, dtype=dtype, device=kernel_device)
    arguments = (grad, list(size), list(resized), [1.5, -0.25], dtype, False)
    result, expected = _preprocess_images_backward_triton(*arguments), preprocess_images_backward_reference(*arguments)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_layout_of_the_input_does_not_matter(layout: str, kernel_device: str) -> None:
    images = make_images(2, 3, 20, 18, device=kernel_device)
    images = images[:1].expand(2, -1, -1, -1) if layout == "expanded" else images
    other = {
        "channels_last": images.contiguous(memory_format=torch.channels_last),
        "transposed": images.transpose(0, 3).contiguous().transpose(0, 3),
        "strided": torch.stack([images, -images], dim=-1)[..., 0],
        "expanded": images,
    }[layout]
    assert not other.is_contiguous()
    arguments = ([12, 12], [12, 12], -1.0, 1.0, MEAN, STD, "pil", torch.float32, False)
    for run in (_preprocess_images_triton, preprocess_images_reference):
        assert torch.equal(run(other, *arguments), run(images.contiguous(), *arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_result_and_gradient_have_the_layout_asked_for(channels_last: bool, match: Match, device: str) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = make_images(2, 3, 20, 18, device=device).contiguous(memory_format=memory_format).requires_grad_()
    # unresized, resized along one axis, along both
    for resize in ((20, 18), (20, 12), (12, 12)):
        arguments: dict[str, Any] = {"resize": resize, "crop": (10, 12), "mean": MEAN, "std": STD, "match": match}
        result = preprocess_images(images, dtype=torch.bfloat16, channels_last=channels_last, **arguments)
        plain = preprocess_images(images, dtype=torch.bfloat16, **arguments)
        assert result.is_contiguous(memory_format=memory_format)
        assert torch.equal(result, plain)
        (grad,) = torch.autograd.grad(result.float().square().sum(), images)
        assert grad.is_contiguous(memory_format=memory_format)
        assert torch.equal(grad, torch.autograd.grad(plain.float().square().sum(), images)[0])


def test_offsets_pass_2_to_the_31(kernel_device: str) -> None:
    # only the few pages that are touched become resident
    far = 2**30 + 8
    buffer = torch.empty(3 * far, dtype=torch.float16, device=kernel_device)
    sizes_strides: list[tuple[Size, tuple[int, ...]]] = [((3, 2), (1, 8, far, 1)), ((2, 3), (1, 8, 1, far))]
    for size, strides in sizes_strides:
        images = buffer.as_strided((1, 1, *size), strides)
        images.copy_(make_images(1, 1, *size))
        arguments = ([2, 2], [2, 2], -1.0, 1.0, MEAN[:1], STD[:1], "pil", torch.float32, False)
        expected = preprocess_images_reference(images.contiguous(), *arguments)
        assert torch.equal(_preprocess_images_triton(images, *arguments), expected)


def test_a_nan_never_becomes_a_number(kernel_device: str) -> None:
    images = make_images(1, 1, 40, 40, device=kernel_device)
    images[0, 0, 20, 20] = torch.nan
    arguments = ([20, 20], [20, 20], -1.0, 1.0, MEAN[:1], STD[:1], "pil", torch.float32, False)
    for run in (_preprocess_images_triton, preprocess_images_reference):
        assert run(images, *arguments)[0, 0, 10, 10].isnan()


@given(value=st.floats(-1, 1), size=st.tuples(SIDE, SIDE), resized=st.tuples(SIDE, SIDE))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_constant_image_stays_constant(value: float, size: Size, resized: Size) -> None:
    images = torch.full((1, 1, *size), value)
    tolerances: dict[Match, float] = {"pil": 0.5 / 255, "torch": 1e-6}
    for match, tolerance in tolerances.items():
        result = preprocess_images(images, resize=resized, mean=[0], std=[1], match=match)
        torch.testing.assert_close(result, torch.full_like(result, (value + 1) / 2), rtol=0, atol=tolerance + 1e-6)


@given(size=st.tuples(SIDE, SIDE), resized=st.tuples(SIDE, SIDE))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_flips_commute(size: Size, resized: Size) -> None:
    images = make_images(1, 3, *size)
    for match, tolerance in (("pil", 1.01), ("torch", 1e-3)):
        for dims in ([2], [3]):
            arguments: dict[str, Any] = {**BYTES, "low": -1.0, "high": 1.0, "resize": resized, "match": match}
            flipped = preprocess_images(images.flip(dims), **arguments).flip(dims)
            torch.testing.assert_close(flipped, preprocess_images(images, **arguments), rtol=0, atol=tolerance)


def test_the_short_side_and_the_crop_are_those_of_transformers() -> None:
    columns = torch.arange(50.0).expand(1, 1, 21, 50)
    arguments: dict[str, Any] = {"low": 0.0, "high": 1.0, "mean": [0], "std": [1], "match": "torch"}
    assert preprocess_images(columns, resize=8, **arguments).shape == (1, 1, 8, 19)
    assert preprocess_images(columns.mT, resize=8, **arguments).shape == (1, 1, 19, 8)
    # 13 * 50 / 21 = 30.95 is cut off
    assert preprocess_images(columns, resize=13, **arguments).shape == (1, 1, 13, 30)
    # 50 - 7 is odd: the larger half is cut off at the end
    assert preprocess_images(columns, resize=21, crop=(1, 7), **arguments).tolist() == [[[[*range(21, 28)]]]]


@pytest.mark.parametrize("match", MATCHES)
def test_a_crop_is_the_middle_of_what_was_resized(match: Match) -> None:
    arguments: dict[str, Any] = {"resize": (33, 40), "mean": MEAN, "std": STD, "match": match}
    images = make_images(1, 3, 20, 31)
    whole, cropped = preprocess_images(images, **arguments), preprocess_images(images, crop=(30, 17), **arguments)
    # of the odd 3 and 23 pixels that go, the larger half is at the end
    torch.testing.assert_close(cropped, whole[..., 1:31, 11:28], rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("match", MATCHES)
def test_operators_are_well_formed(match: str, device: str) -> None:
    images = make_images(2, 3, 20, 18, device=device).requires_grad_()
    for channels_last, resized in ((False, [12, 14]), (True, [12, 14]), (True, [20, 18])):
        arguments = (images, resized, [12, 12], -1.0, 1.0, MEAN, STD, match, torch.bfloat16, channels_last)
        checks = QUICK_CHECKS if channels_last else ALL_CHECKS
        torch.library.opcheck(torch.ops.fastgrpo.preprocess_images.default, arguments, test_utils=checks)
        grad = make_images(2, 3, 12, 12, device=device)
        backward = (grad, [20, 18], resized, STD, torch.float32, channels_last)
        torch.library.opcheck(torch.ops.fastgrpo.preprocess_images_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_with_its_gradient(device: str) -> None:
    def loss(images: Tensor) -> Tensor:
        return preprocess_images(2 * images, resize=12, crop=(12, 12), mean=MEAN, std=STD).square().sum()

    images = make_images(2, 3, 20, 18, device=device).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend=BACKEND)
    result, expected = compiled(images), loss(images)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, images), torch.autograd.grad(expected, images))


@pytest.mark.parametrize("device", DEVICES)
def test_no_images_give_no_images(device: str) -> None:
    images = make_images(0, 3, 20, 18, device=device).requires_grad_()
    result = preprocess_images(images, resize=12, crop=(12, 12), mean=MEAN, std=STD)
    assert result.shape == (0, 3, 12, 12)
    assert torch.autograd.grad(result.sum(), images)[0].shape == (0, 3, 20, 18)


def test_wrong_input_is_refused_with_the_remedy() -> None:
    arguments: dict[str, Any] = {"images": make_images(2, 3, 20, 18), "resize": 12, "mean": MEAN, "std": STD}
    for change, message in (
        ({"images": torch.zeros(3, 20, 18)}, r"\[B, C, H, W\], got torch.float32 of shape \(3, 20, 18\); cast them or"),
        ({"images": torch.zeros(2, 3, 20, 18, dtype=torch.uint8)}, "got torch.uint8 .*; cast them"),
        ({"images": torch.zeros(2, 3, 0, 18)}, r"images are \(2, 3, 0, 18\), .* images of at least one pixel"),
        ({"mean": MEAN[:1]}, "with 1 values of mean and 3 of std; pass one of each per channel"),
        ({"std": [0.5, 0.0, 0.5]}, "std must be positive, got .*; pass the deviations"),
        ({"low": 1.0}, "low must be below high, got 1.0 and 1.0; pass the values of black and white"),
        ({"match": "tf"}, "match must be 'pil' or 'torch', got 'tf'"),
        ({"dtype": torch.uint8}, "dtype must be float32, bfloat16 or float16, got torch.uint8; cast the result"),
        ({"resize": 0}, r"crop of \(0, 0\) does not fit in \(0, 0\), .*; make both positive"),
        ({"crop": (14, 12)}, r"crop of \(14, 12\) does not fit in \(13, 12\), to which 20 x 18 is .* no larger"),
    ):
        with pytest.raises(ValueError, match=message):
            preprocess_images(**{**arguments, **change})
