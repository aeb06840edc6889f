import pytest
import torch
from torch import nn

from nni_plugins.pruners import PruningError
from nni_plugins.pruners.patterns import Pattern, as_pattern, input_layout


def test_a_linear_layer_keeps_two_of_four_along_its_inputs():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.1, 0.2, 0.3, 0.4]])
    assert Pattern(2, 4).mask(weight.abs()).int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]


def test_a_convolution_has_its_blocks_along_the_input_channels():
    """As in NVIDIA's ASP: [out, in, h, w] is permuted so that the input channels are last."""
    weight = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = Pattern(2, 4).mask(weight.abs())
    rows = weight.permute(2, 3, 0, 1).reshape(-1, 4)
    expected = torch.zeros_like(rows).scatter_(1, rows.abs().topk(2, dim=1).indices, 1.0)
    assert torch.equal(mask.permute(2, 3, 0, 1).reshape(-1, 4).float(), expected)
    assert mask.shape == weight.shape
    assert mask.float().mean() == 0.5
    assert Pattern(2, 4).holds(mask)


@pytest.mark.parametrize("inputs", [1, 2, 3, 5, 6, 7])
def test_a_rest_of_inputs_keeps_at_most_n(inputs):
    pattern = Pattern(2, 4)
    mask = pattern.mask(torch.rand(3, inputs, 2, generator=torch.Generator().manual_seed(0)))
    full, rest = divmod(inputs, 4)
    assert (mask.sum(dim=1) == 2 * full + min(rest, 2)).all()
    assert pattern.holds(mask)


@pytest.mark.parametrize(
    "module",
    [nn.Linear(12, 5), nn.Conv1d(8, 4, 3), nn.Conv3d(4, 4, 2), nn.Conv2d(8, 8, 3, groups=2),
     nn.ConvTranspose2d(8, 4, 3), nn.ConvTranspose2d(12, 6, 3, groups=3)],
)  # fmt: skip
def test_blocks_go_there_and_back(module):
    weight, layout, pattern = module.weight.detach(), input_layout(module), Pattern(2, 4)
    assert torch.equal(pattern.restore(pattern.blocks(weight, *layout), weight, *layout), weight)
    mask = pattern.mask(weight.abs(), *layout)
    assert pattern.holds(mask, *layout)
    inputs = weight.shape[layout[0]] // layout[1]
    assert mask.sum() == weight.numel() * (inputs // 4 * 2) / inputs


def test_a_transposed_convolution_has_its_inputs_first_and_blocks_stay_within_a_group():
    layer = nn.ConvTranspose2d(6, 4, 1, groups=2)  # three inputs in each group
    mask = Pattern(2, 4).mask(layer.weight.detach().abs(), *input_layout(layer))
    assert mask[:3].sum(0).eq(2).all()
    assert mask[3:].sum(0).eq(2).all()


def test_equal_scores_keep_the_first():
    assert Pattern(1, 4).mask(torch.ones(1, 8)).int().tolist() == [[1, 0, 0, 0, 1, 0, 0, 0]]


def test_a_mask_with_too_many_is_found_out():
    mask = torch.zeros(1, 8)
    mask[0, :3] = 1
    assert not Pattern(2, 4).holds(mask)
    assert Pattern(3, 4).holds(mask)


@pytest.mark.parametrize("text", ["2-4", "4:2", "0:4", "4:4", 24])
def test_what_is_no_pattern(text):
    with pytest.raises(PruningError, match="pattern is"):
        as_pattern(text)
    assert as_pattern("2:4") == Pattern(2, 4) == as_pattern(Pattern(2, 4))
    assert as_pattern(None) is None


def test_a_vector_has_no_input_dimension():
    with pytest.raises(PruningError, match="no input dimension"):
        Pattern(2, 4).mask(torch.rand(8))
