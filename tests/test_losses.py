"""Equations 8 to 12 against plain float64 references written from the equations."""

import math

import numpy as np
import pytest
import torch

from pmm import BadInput
from pmm.train import losses
from pmm.train.heads import Output, valid_frames

PAIRS = [("image", "text"), ("image", "audio"), ("text", "audio")]


def softmax(row):
    row = np.exp(row - row.max())
    return row / row.sum()


def reference_position(prediction, target):
    return sum(sum((b - a) ** 2 for a, b in zip(p, t)) for p, t in zip(prediction, target)) / len(target)


def reference_motion(prediction, target):
    if len(target) == 1:
        return 0.0
    return reference_position(prediction[1:] - prediction[:-1], target[1:] - target[:-1])


def reference_divergence(similarity):
    total = 0.0
    for i, row in enumerate(similarity):
        target = softmax(10 * np.eye(len(row))[i])
        predicted = softmax(row)
        total += sum(t * math.log(t / p) for t, p in zip(target, predicted))
    return total


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def reference_temporal(aligned, scale, pairs=PAIRS):
    values = []
    for first, second in pairs:
        similarity = np.array([[scale * cosine(x, y) for y in aligned[second]] for x in aligned[first]])
        values.append((reference_divergence(similarity) + reference_divergence(similarity.T)) / 2)
    return sum(values) / len(values)


def reference_semantic(aligned, pairs=PAIRS):
    return sum(1 - cosine(aligned[a].mean(0), aligned[b].mean(0)) for a, b in pairs) / len(pairs)


@pytest.fixture
def batch():
    """Three clips of 1, 7 and 12 frames in float64, with rubbish where they have ended."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([1, 7, 12])

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    aligned = {name: draw(3, 12, 6) for name in ("image", "text", "audio")}
    return draw(3, 12, 5), draw(3, 12, 5), aligned, lengths, valid_frames(lengths)


def mean_over_clips(lengths, value):
    return np.mean([value(index, int(length)) for index, length in enumerate(lengths)])


def test_position_and_motion_are_equations_9_and_10(batch):
    prediction, target, _, lengths, valid = batch
    for ours, theirs in [(losses.position, reference_position), (losses.motion, reference_motion)]:
        expected = mean_over_clips(
            lengths, lambda i, n, f=theirs: f(prediction[i, :n].numpy(), target[i, :n].numpy())
        )
        assert ours(prediction, target, valid).item() == pytest.approx(expected, rel=1e-12)
        assert ours(prediction, target, valid, "mean").item() == pytest.approx(expected / 5, rel=1e-12)


def test_motion_of_one_frame_is_zero():
    one = torch.ones(1, 1, 4)
    assert losses.motion(one, 0 * one, valid_frames(torch.tensor([1]))).item() == 0.0


def test_temporal_is_equation_11_with_a_sharp_target(batch):
    *_, aligned, lengths, valid = batch
    expected = mean_over_clips(
        lengths, lambda i, n: reference_temporal({k: x[i, :n].numpy() for k, x in aligned.items()}, 14.3)
    )
    ours = losses.temporal(aligned, torch.tensor(14.3, dtype=torch.float64), valid)
    assert ours.item() == pytest.approx(expected, rel=1e-10)


def test_temporal_is_least_when_the_frames_recognise_each_other():
    """At the target's own logits the divergence vanishes: scale 10, one direction a frame."""
    own = torch.eye(8, dtype=torch.float64)[None]
    value = losses.temporal({"text": own, "audio": own}, torch.tensor(10.0), valid_frames(torch.tensor([8])))
    assert value.item() == pytest.approx(0.0, abs=1e-12)


def test_semantic_is_equation_12(batch):
    *_, aligned, lengths, valid = batch
    expected = mean_over_clips(
        lengths, lambda i, n: reference_semantic({k: x[i, :n].numpy() for k, x in aligned.items()})
    )
    assert losses.semantic(aligned, valid).item() == pytest.approx(expected, rel=1e-10)


def test_without_a_modality_the_means_go_over_the_pairs_that_remain(batch):
    *_, aligned, lengths, valid = batch
    two = {name: aligned[name] for name in ("text", "audio")}
    scale = torch.tensor(5.0, dtype=torch.float64)
    expected = mean_over_clips(
        lengths,
        lambda i, n: reference_temporal({k: x[i, :n].numpy() for k, x in two.items()}, 5.0, [PAIRS[2]]),
    )
    assert losses.temporal(two, scale, valid).item() == pytest.approx(expected, rel=1e-10)
    one = {"audio": aligned["audio"]}
    assert losses.temporal(one, scale, valid).item() == 0.0
    assert losses.semantic(one, valid).item() == 0.0


def test_total_weighs_the_four_as_equation_8(batch):
    prediction, target, aligned, _, valid = batch
    output = Output(prediction, aligned, torch.tensor(14.3, dtype=torch.float64))
    value = losses.total(output, target, valid, losses.Weights())
    expected = value.position + 10 * value.motion + 1e-4 * value.temporal + 1e-5 * value.semantic
    assert value.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert min(value.position, value.motion, value.temporal, value.semantic) > 0
    without = losses.total(output, target, valid, losses.Weights(temporal=0, motion=0))
    assert without.temporal == without.motion == 0
    assert without.total.item() == pytest.approx((value.position + 1e-5 * value.semantic).item(), rel=1e-12)


def slope(value, x, by=1e-6):
    """Central differences of ``value()`` with respect to every entry of the array ``x``."""
    found = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        kept = x[index]
        x[index] = kept + by
        above = value()
        x[index] = kept - by
        found[index] = (above - value()) / (2 * by)
        x[index] = kept
    return found


@pytest.mark.parametrize("name", ["position", "motion", "temporal", "semantic"])
def test_each_gradient_is_that_of_the_reference(name):
    """Two clips of 3 and 5 frames, the first padded: autograd against differences of the plain references."""
    generator = torch.Generator().manual_seed(8)
    lengths = [3, 5]
    prediction, target, *aligned = (
        torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    aligned = dict(zip(("image", "text", "audio"), aligned))
    valid = valid_frames(torch.tensor(lengths))
    leaves = {"prediction": prediction} if name in ("position", "motion") else aligned
    for leaf in leaves.values():
        leaf.requires_grad_()
    ours = {
        "position": lambda: losses.position(prediction, target, valid),
        "motion": lambda: losses.motion(prediction, target, valid),
        "temporal": lambda: losses.temporal(aligned, torch.tensor(9.0, dtype=torch.float64), valid),
        "semantic": lambda: losses.semantic(aligned, valid),
    }[name]
    gradients = torch.autograd.grad(ours(), list(leaves.values()))

    arrays = {key: leaf.detach().numpy() for key, leaf in (leaves | {"target": target}).items()}

    def reference():
        return mean_over_clips(lengths, one_clip)

    def one_clip(i, n):
        cut = {key: x[i, :n] for key, x in arrays.items()}
        if name == "position":
            return reference_position(cut["prediction"], cut["target"])
        if name == "motion":
            return reference_motion(cut["prediction"], cut["target"])
        return reference_temporal(cut, 9.0) if name == "temporal" else reference_semantic(cut)

    for key, gradient in zip(leaves, gradients):
        np.testing.assert_allclose(gradient.numpy(), slope(reference, arrays[key]), rtol=1e-6, atol=1e-7)
        assert not gradient[0, 3:].any()
        assert gradient[0, :3].abs().max() > 1e-4


def test_what_stands_after_a_clip_changes_neither_losses_nor_gradients(batch):
    prediction, target, aligned, lengths, valid = batch
    leaves = [prediction, *aligned.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    weights = losses.Weights(temporal=1.0, semantic=1.0)
    together = losses.total(Output(prediction, aligned, scale), target, valid, weights).total
    gradients = torch.autograd.grad(together, [*leaves, scale])

    alone = []
    for i, n in enumerate(lengths.tolist()):
        cut = {name: x[i : i + 1, :n] for name, x in aligned.items()}
        output = Output(prediction[i : i + 1, :n], cut, scale)
        alone.append(losses.total(output, target[i : i + 1, :n], valid[i : i + 1, :n], weights).total)
    one_by_one = torch.stack(alone).mean()
    assert together.item() == pytest.approx(one_by_one.item(), rel=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad(one_by_one, [*leaves, scale])):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_an_unknown_reduction_is_refused(batch):
    prediction, target, _, _, valid = batch
    with pytest.raises(BadInput, match="loss reduction 'max' is none of sum, mean"):
        losses.position(prediction, target, valid, "max")
