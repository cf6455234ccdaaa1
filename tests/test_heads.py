"""Shapes, masks, reach and wiring of the trained heads, on small sizes."""

import math

import pytest
import torch

from pmm import BadInput
from pmm.train import losses
from pmm.train.heads import Heads, HeadsConfig, band_bias, periodic_positions, preset, slopes, valid_frames

SMALL = {
    "feature_sizes": {"audio": 6, "text": 7},
    "coefficients": 5,
    "styles": 3,
    "fps": 4,
    "width": 8,
    "style_width": 8,
    "attention_heads": 2,
    "image_size": 16,
    "image_rows": (8, 16),
    "image_channels": (4, 6),
    "dropout": 0.0,
    "modality_dropout": 0.0,
}


def small(seed=0, **changes):
    """Heads whose every weight is drawn, the output layer's too."""
    torch.manual_seed(seed)
    heads = Heads(HeadsConfig(**{**SMALL, **changes})).eval()
    torch.nn.init.normal_(heads.decoder.output.weight, std=0.3)
    return heads


def inputs(config, batch, frames, seed=1):
    generator = torch.Generator().manual_seed(seed)
    height = config.image_rows[1] - config.image_rows[0]
    return {
        "audio": torch.randn(batch, frames, 6, generator=generator),
        "text": torch.randn(batch, frames, 7, generator=generator),
        "image": torch.randint(
            0, 256, (batch, frames, height, config.image_size, 3), generator=generator, dtype=torch.uint8
        ),
    }


def test_slopes_are_alibis():
    assert slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert slopes(6) == [*slopes(4), 2**-1, 2**-3]


def test_band_bias_by_hand():
    frames = torch.arange(5)
    bias = band_bias(frames, frames, torch.tensor([0.5]), past=3, future=1, period=2)[0]
    no = -math.inf
    assert bias.tolist() == [
        [0, 0, no, no, no],
        [0, 0, 0, no, no],
        [-0.5, 0, 0, 0, no],
        [-0.5, -0.5, 0, 0, 0],
        [no, -0.5, -0.5, 0, 0],
    ]


def test_positions_repeat_with_the_period():
    table = periodic_positions(65, 30, 10, torch.device("cpu"))
    assert table.shape == (65, 10)
    assert torch.equal(table[:30], table[30:60])
    assert table[7, 0].item() == pytest.approx(math.sin(7))
    assert table[7, 3].item() == pytest.approx(math.cos(7 * 10_000 ** (-2 / 10)))
    assert torch.equal(table[60:], table[:5])


def test_untrained_heads_predict_the_training_mean():
    torch.manual_seed(0)
    heads = Heads(HeadsConfig(**SMALL))
    mean = torch.arange(5) / 10
    heads.start_from(mean, torch.full((8, 16, 3), 100.0), 2.0)
    valid = valid_frames(torch.tensor([9, 4]))
    output = heads(inputs(heads.config, 2, 9), torch.tensor([0, 2]), valid)
    assert torch.equal(output.prediction, mean.expand(2, 9, 5))
    assert output.scale.item() == pytest.approx(1 / 0.07)
    assert {name: tuple(x.shape) for name, x in output.aligned.items()} == dict.fromkeys(
        ("image", "text", "audio"), (2, 9, 8)
    )


def test_presets_have_the_papers_sizes():
    sizes = {"feature_sizes": {"audio": 1024, "text": 3503}, "coefficients": 32, "styles": 12}
    paper = HeadsConfig(**sizes, **preset("paper", 30))
    assert (paper.decoder_width, paper.attention_heads, paper.decoder_layers, paper.image_layers) == (
        832,
        4,
        2,
        2,
    )
    assert (paper.lookahead, paper.context, paper.image_rows) == (0, 1, (0, 96))
    fast = HeadsConfig(**sizes, **preset("fast", 60))
    assert (fast.decoder_width, fast.lookahead, fast.context, fast.max_context) == (256, 12, 5, 600)
    assert preset("fast", 30, lookahead=0, context=None)["lookahead"] == 0


def test_fast_image_encoder_stays_within_6_mflop_a_frame():
    """Counted on the layers themselves: two operations per multiplication."""
    sizes = {"feature_sizes": {"audio": 8, "text": 8}, "coefficients": 32, "styles": 1}
    image = Heads(HeadsConfig(**sizes, **preset("fast", 30))).image
    operations = []

    def count(module, _, output):
        if isinstance(module, torch.nn.Conv2d):
            operations.append(2 * output[0].numel() * module.weight[0].numel())
        elif isinstance(module, torch.nn.Linear):
            operations.append(2 * module.weight.numel())

    for module in image.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        image(torch.zeros(1, 1, 48, 96, 3, dtype=torch.uint8), valid_frames(torch.tensor([1])))
    assert len(operations) == 8
    assert 4e6 < sum(operations) < 6e6


def test_folding_is_pixel_unshuffle_in_another_channel_order():
    heads = small(image_patch=4)
    frames = inputs(heads.config, 1, 3)["image"][0]
    ours = heads.image._fold(frames).permute(0, 3, 1, 2).float()
    theirs = torch.nn.functional.pixel_unshuffle(frames.permute(0, 3, 1, 2).float(), 4)
    assert torch.equal(ours.unflatten(1, (16, 3)).transpose(1, 2).flatten(1, 2), theirs)


@pytest.mark.parametrize("decoder_input", ["aligned", "separate"])
def test_padding_changes_neither_loss_nor_gradient(decoder_input):
    """A batch of unequal clips, rubbish in its padding, against its clips one by one."""
    heads = small(decoder_input=decoder_input, max_context=6, lookahead=3).double()
    lengths = [1, 5, 17]
    features = {
        name: x.double() if x.is_floating_point() else x for name, x in inputs(heads.config, 3, 17).items()
    }
    target = torch.rand(3, 17, 5, dtype=torch.float64)
    style = torch.tensor([0, 2, 1])
    weights = losses.Weights(temporal=1.0, semantic=1.0)

    def loss(rows, frames):
        cut = {name: x[rows, :frames] for name, x in features.items()}
        valid = valid_frames(torch.tensor(lengths)[rows], frames)
        return losses.total(heads(cut, style[rows], valid), target[rows, :frames], valid, weights).total

    together = loss([0, 1, 2], 17)
    gradient = torch.autograd.grad(together, list(heads.parameters()))
    alone = torch.stack([loss([i], n) for i, n in enumerate(lengths)]).mean()
    one_by_one = torch.autograd.grad(alone, list(heads.parameters()))
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradient, one_by_one):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "changes", [{}, {"decoder_layers": 2, "image_layers": 2}, {"context": 1, "lookahead": 0}]
)
def test_reach_is_what_is_claimed_and_no_less(changes):
    """A change in frame t changes outputs of [t - future, t + past], both ends included, and no other."""
    heads = small(**{"max_context": 4, "lookahead": 3, "context": 3, **changes})
    features = inputs(heads.config, 1, 60)
    valid = valid_frames(torch.tensor([60]))
    with torch.no_grad():
        before = heads(features, torch.tensor([1]), valid).prediction
        at = 30
        changed = {name: x.clone() for name, x in features.items()}
        for x in changed.values():
            x[:, at] = 255 - x[:, at]
        after = heads(changed, torch.tensor([1]), valid).prediction
    moved = (before != after).any(-1)[0].nonzero().flatten().tolist()
    assert min(moved) == at - heads.reach.future
    assert max(moved) == at + heads.reach.past
    assert max(moved) < 59


def moved(heads, features, name, at):
    """The frames whose output changes with frame ``at`` of one modality."""
    valid = valid_frames(torch.tensor([features[name].shape[1]]))
    changed = features[name].clone()
    changed[:, at] = 255 - changed[:, at]
    with torch.no_grad():
        before = heads(features, torch.tensor([1]), valid).prediction
        after = heads({**features, name: changed}, torch.tensor([1]), valid).prediction
    return (before != after).any(-1)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("decoder_input", ["aligned", "separate"])
@pytest.mark.parametrize("layers", [(1, 1), (2, 3)])
def test_audio_and_text_reach_as_far_as_the_decoder_and_images_one_encoder_further(
    layers, decoder_input, latents
):
    """One decoder layer, as ``fast`` has: nothing after t + max_context, but for images, and the context."""
    decoder_layers, image_layers = layers
    config = {"max_context": 4, "lookahead": 3, "context": 3, "decoder_input": decoder_input}
    sizes = {**SMALL["feature_sizes"], **({"image": 9} if latents else {})}
    heads = small(feature_sizes=sizes, decoder_layers=decoder_layers, image_layers=image_layers, **config)
    features, at = inputs(heads.config, 1, 60), 30
    if latents:
        features["image"] = torch.randn(1, 60, 9, generator=torch.Generator().manual_seed(2))
    first, last = at - 3 - 1, at + decoder_layers * 4 + 1
    for name in ("audio", "text"):
        frames = moved(heads, features, name, at)
        assert (min(frames), max(frames)) == (first, last), name
    frames = moved(heads, features, "image", at)
    assert (min(frames), max(frames)) == (first, last + image_layers * 4)
    assert heads.reach.past == last + image_layers * 4 - at
    assert heads.reach.future == at - first
    assert (
        small(modalities=("text", "audio"), decoder_layers=decoder_layers, **config).reach.past == last - at
    )


@pytest.mark.parametrize("name", ["paper", "fast"])
def test_the_presets_reach_is_what_the_paper_page_says(name):
    sizes = {"feature_sizes": {"audio": 8, "text": 8}, "coefficients": 32, "styles": 1}
    heads = Heads(HeadsConfig(**sizes, **preset(name, 30)))
    chained, side, lookahead = (4, 0, 0) if name == "paper" else (2, 2, 6)
    assert (heads.reach.past, heads.reach.future) == (chained * 600 + side, lookahead + side)


def test_clips_of_a_batch_do_not_hear_each_other():
    heads = small()
    features, valid = inputs(heads.config, 3, 12), valid_frames(torch.tensor([12, 7, 9]))
    style = torch.tensor([0, 1, 2])
    before = heads(features, style, valid).prediction
    other = {name: torch.cat([255 - x[:1], x[1:]]) for name, x in features.items()}
    after = heads(other, style, valid).prediction
    assert torch.equal(before[1:][valid[1:]], after[1:][valid[1:]])
    assert not torch.equal(before[0], after[0])


def test_each_modality_and_the_style_reach_the_output():
    heads = small()
    valid = valid_frames(torch.tensor([8]))
    features = inputs(heads.config, 1, 8)
    before = heads(features, torch.tensor([1]), valid).prediction
    for name, x in features.items():
        after = heads({**features, name: 255 - x}, torch.tensor([1]), valid).prediction
        assert not torch.allclose(before, after), name
    assert not torch.allclose(before, heads(features, torch.tensor([2]), valid).prediction)


def test_queries_in_blocks_equal_one_block(monkeypatch):
    heads = small(max_context=9, lookahead=3)
    features, valid = inputs(heads.config, 2, 70), valid_frames(torch.tensor([70, 33]))
    with torch.no_grad():
        whole = heads(features, torch.tensor([0, 1]), valid).prediction
        monkeypatch.setattr("pmm.train.heads.QUERY_BLOCK", 16)
        blocks = heads(features, torch.tensor([0, 1]), valid).prediction
    torch.testing.assert_close(blocks[valid], whole[valid], rtol=0, atol=1e-5)


def test_the_temporal_loss_reaches_every_projection_the_decoder_reads():
    heads = small()
    valid = valid_frames(torch.tensor([8, 6]))
    output = heads(inputs(heads.config, 2, 8), torch.tensor([0, 1]), valid)
    losses.temporal(output.aligned, output.scale, valid).backward()
    assert set(heads.alignment.projections) == {"image", "text", "audio"}
    for name, project in heads.alignment.projections.items():
        assert project.convolution.weight.grad.abs().max() > 1e-6, name
    assert heads.image.flat.weight.grad.abs().max() > 1e-6
    assert heads.alignment.log_scale.grad.abs() > 1e-6


def test_separate_projections_are_not_reached_by_it():
    heads = small(decoder_input="separate")
    valid = valid_frames(torch.tensor([8]))
    output = heads(inputs(heads.config, 1, 8), torch.tensor([0]), valid)
    losses.temporal(output.aligned, output.scale, valid).backward()
    assert all(parameter.grad is None for parameter in heads.separate.parameters())


def test_a_removed_modality_takes_its_branch_with_it():
    heads = small(modalities=("text", "audio"))
    assert heads.image is None
    assert heads.config.decoder_width == 2 * 8 + 8
    assert heads.config.pairs == (("text", "audio"),)
    valid = valid_frames(torch.tensor([8]))
    features = {k: x for k, x in inputs(heads.config, 1, 8).items() if k != "image"}
    assert set(heads(features, torch.tensor([0]), valid).aligned) == {"text", "audio"}


def test_the_scale_is_held_at_100():
    heads = small()
    torch.nn.init.constant_(heads.alignment.log_scale, 9.0)
    heads.alignment.limit_scale()
    assert heads.alignment.log_scale.exp().item() == pytest.approx(100)


def test_config_survives_json():
    config = HeadsConfig(**SMALL)
    assert HeadsConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 4}, "context 4: it must be an odd number of frames, such as 1 or 5"),
        ({"lookahead": -1}, "lookahead -1, max_context 600: they must be at least 0 and 1"),
        ({"decoder_input": "both"}, "decoder input 'both' is neither 'aligned' nor 'separate'"),
        ({"modalities": ()}, "modalities none: at least one of image, text, audio must remain"),
        ({"attention_heads": 3}, "widths 8 and 32 must divide by 3, the number of attention heads"),
    ],
)
def test_sizes_that_cannot_work_are_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        HeadsConfig(**{**SMALL, **changes})
