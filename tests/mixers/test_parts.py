"""Formulas of single parts that a mixer's recurrence does not show."""

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.mixers import check_mixer
from linearize.mixers.mixer import TokenMixer
from linearize.mixers.parts import HeadShape
from linearize.registry import feature_maps, gates


def test_taylor_products_are_the_series_of_exp():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(7, 3, 20, generator=generator) for _ in "qk")
    phi = feature_maps.get("taylor")(3, 20, dim=6)
    s = (q[..., :6].double() * k[..., :6].double()).sum(-1) / 6**0.5
    with torch.no_grad():
        got = (phi(q).double() * phi(k).double()).sum(-1)
    torch.testing.assert_close(got, 1 + s + s**2 / 2, rtol=1e-5, atol=1e-5)
    assert phi(q).shape[-1] == phi.feature_dim == 1 + 6 + 21


def test_exp_features_of_large_keys_stay_finite():
    features = feature_maps.get("exp")(2, 8)(torch.linspace(-300, 300, 16).view(2, 8))
    assert features.isfinite().all()
    assert features.amax(-1).eq(1).all()


def test_t2r_starts_at_the_positive_channels_where_asked():
    x = torch.randn(5, 2, 12, generator=torch.Generator().manual_seed(0))
    features = feature_maps.get("t2r")(2, 12, dim=7, identity=True)(x)
    torch.testing.assert_close(features, x[..., :7].clamp(min=0))


@pytest.mark.parametrize(("layer", "highest", "bound"), [(0, 1.0, 0.0), (2, 1.0, 0.5), (3, 0.4, 0.3)])
def test_the_lower_bound_rises_with_depth(layer, highest, bound):
    gate = gates.get("lower_bounded")(HeadShape(4, 2, 6, 8, layer, 4), highest=highest)
    k = 4 * torch.randn(9, 2, 6, generator=torch.Generator().manual_seed(0))
    keep = bound + (1 - bound) / (1 + (-k.double()).exp())
    torch.testing.assert_close(gate(torch.zeros(9, 8), k).double(), keep.log(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gate.keys(k).double(), 1 - keep, rtol=1e-4, atol=1e-6)
    assert gate(torch.zeros(9, 8), k).exp().min() >= bound


WRONG = {
    "a scan has no gate": ({"memory": "scan", "gate": "scalar"}, "decay of its own.*gate: none"),
    "nothing to gate": ({"combine": "window_only", "output_gate": "silu"}, "output_gate: silu.*no memory"),
    "nothing to convolve": ({"combine": "window_only", "conv": 4}, "conv.*no memory"),
    "dt makes keys long": ({"feature_map": "l2norm", "memory": "delta", "gate": "dt"}, "delta.*gate: dt.*another gate"),
    "a skip has no weight": ({"feature_map": "softmax", "memory": {"name": "additive", "skip": 1.0}, "normalize": True},
                             "`skip`.*sum of weights"),
    "features per channel": ({"feature_map": "hedgehog", "memory": "scan"}, "a feature per channel"),
    "an uneven scan": ({"memory": {"name": "scan", "state": 7}}, "`state` must divide the head dim"),
    "a gate that is no number": ({"gate": {"name": "scalar", "bias": float("nan")}}, "must be float, got nan"),
    "no rank": ({"memory": {"name": "scan", "rank": 0}}, "`rank` must be at least 1"),
    "steps": ({"gate": {"name": "dt", "shortest": 0.2}}, "`shortest`.*`longest`"),
    "rates": ({"gate": {"name": "dt", "fastest": -1.0}}, "`fastest` must lie above 0"),
    "a bound": ({"gate": {"name": "lower_bounded", "highest": 1.5}, "feature_map": "softmax"}, "`highest`"),
    "no columns": ({"feature_map": {"name": "t2r", "dim": 0}}, "`dim` must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_fit_are_refused(make_mixer, name):
    fields, words = WRONG[name]
    with pytest.raises(LinearizeError, match=words):
        check_mixer(make_mixer(**fields))


def test_a_terrace_has_no_sinks(make_mixer):
    with pytest.raises(ValueError, match=r"terrace.*no sinks"):
        make_mixer(window={"size": 8, "sinks": 2, "kind": "terrace"})


def test_a_terrace_reaches_no_further_than_the_teacher(make_mixer):
    spec = make_mixer(combine="window_only", window={"size": 64, "kind": "terrace"})
    assert TokenMixer(HeadShape(2, 1, 16, 8), spec, 1.0, max_window=31).window == 30
    assert TokenMixer(HeadShape(2, 1, 16, 8), spec, 1.0, max_window=4096).window == 128
