"""The registry and the parameters of policies."""

import dataclasses

import pytest
import torch

from refreekv import policies
from refreekv.core.reductions import ProbeReductions
from refreekv.core.selection import CutSelection, Selection
from refreekv.policies import LayerView, Policy
from refreekv.policies.registry import _POLICIES


def view(n=40, batch=2, heads=4, kv_heads=2, probe_rows=8, seed=0, pads=0):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(batch, n, dtype=torch.bool)
    valid[0, :pads] = False
    columns = torch.arange(n)
    visible = valid[:, None] & (columns <= torch.arange(n - probe_rows, n)[:, None])
    logits = torch.randn(batch, heads, probe_rows, n, generator=generator) * 3
    rows = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    keys = torch.randn(batch, kv_heads, n, 8, generator=generator)
    queries = torch.randn(batch, heads, probe_rows, 8, generator=generator)
    return LayerView(
        keys,
        keys.clone(),
        valid if pads else None,
        rows,
        layer=5,
        layers=9,
        queries=queries,
        window=reduced(rows, kv_heads),
        spread=reduced(rows[:, :, ::2], kv_heads),
        heads=heads,
        copy_scores=torch.zeros(1, kv_heads),
    )


def reduced(rows, kv_heads):
    batch, _, _, length = rows.shape
    grouped = rows.reshape(batch, kv_heads, -1, length)
    return ProbeReductions(grouped.amax(2), grouped.mean(2))


SMALL = {"adaptive": {"min_length": 0, "window": 8, "constant": 0.2, "follow": 2, "hit": 0.8, "lost_mass": 0.7}}
"""Parameters for policies whose defaults keep a prompt of 40 tokens whole."""


def kept(policy, layer):
    """What the policy keeps, as a mask [B, G, n] without padding."""
    if isinstance(policy, policies.JointPolicy):
        selections = [policy.allot([row])[0] for row in policy.examine(layer).rows()]
        selection = Selection(torch.cat([one.keep for one in selections]))
    else:
        selection = policy.select(layer)
    if isinstance(selection, CutSelection):
        return selection.mask(layer.real)
    return selection.keep & layer.real[:, None]


def every_policy():
    """One of each registered policy: with its defaults, or at half the cache where it needs a budget."""
    made = []
    for name in policies.available():
        try:
            made.append(policies.create(name, **SMALL.get(name, {})))
        except ValueError:
            made.append(policies.create(name, ratio=0.5))
    return [policy for policy in made if policy.name != "full"]


def test_the_public_defaults_are_the_papers():
    policy = policies.create("refreekv")
    assert dataclasses.asdict(policy) == {
        "threshold": 0.01,
        "sinks": 4,
        "probe_rows": 1,
        "probe_reduce": "mean",
        "frozen_layers": 2,
        "norm_includes_sinks": False,
    }
    heavy = policies.create("refreekv-heavy-hitter")
    assert (heavy.threshold, heavy.recent, heavy.probe_rows) == (0.05, 8, 8)


def test_every_policy_is_listed_with_a_line():
    listed = policies.available()
    assert {"refreekv", "refreekv-heavy-hitter", "streaming-llm"} <= set(listed)
    for name, line in listed.items():
        assert line, name
        assert "\n" not in line


@pytest.mark.parametrize("policy", every_policy(), ids=lambda p: p.name)
@pytest.mark.parametrize("pads", [0, 7])
def test_every_policy_gives_a_sound_selection(policy, pads):
    layer = view(pads=pads)
    keep = kept(policy, layer)
    assert keep.dtype == torch.bool
    assert keep.shape in ((2, 1, 40), (2, 2, 40))
    assert keep[..., -1].all(), "the last token is the next one's neighbour"
    counts = keep.sum(-1)
    assert (counts < layer.real.sum(-1)[:, None]).any(), "nothing was evicted: the test shows nothing"
    assert isinstance(policy, Policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.sinks = 1


@pytest.mark.parametrize("policy", every_policy(), ids=lambda p: p.name)
def test_a_row_is_selected_alike_alone_and_padded_in_a_batch(policy):
    alone = view(n=33, batch=1, seed=3)
    pads = 7
    padded = LayerView(
        torch.nn.functional.pad(alone.keys, (0, 0, pads, 0)),
        torch.nn.functional.pad(alone.values, (0, 0, pads, 0)),
        torch.nn.functional.pad(alone.real, (pads, 0)),
        torch.nn.functional.pad(alone.rows, (pads, 0), value=0.0),
        alone.layer,
        alone.layers,
        queries=alone.queries,
        window=ProbeReductions(*(torch.nn.functional.pad(part, (pads, 0)) for part in alone.window)),
        spread=ProbeReductions(*(torch.nn.functional.pad(part, (pads, 0)) for part in alone.spread)),
        heads=alone.heads,
        copy_scores=alone.copy_scores,
    )
    assert torch.equal(kept(policy, alone), kept(policy, padded)[..., pads:])


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("refreekv", {"threshold": 1.0}, "threshold"),
        ("refreekv", {"threshold": -0.01}, "threshold"),
        ("refreekv", {"sinks": -1}, "sinks must be an integer >= 0"),
        ("refreekv", {"sinks": 1.5}, "sinks must be an integer"),
        ("refreekv", {"probe_rows": 0}, "probe_rows must be an integer >= 1"),
        ("refreekv", {"probe_reduce": "median"}, "probe_reduce must be"),
        ("refreekv", {"frozen_layers": "some"}, "frozen_layers"),
        ("adaptive", {"constant": 1.0}, r"constant must lie in \[0, 1\)"),
        ("adaptive", {"constant": "small"}, "constant must lie in"),
        ("adaptive", {"window": 0}, "window must be an integer >= 1"),
        ("adaptive", {"copying": -0.1}, "copying must lie in"),
        ("adaptive", {"shared": 1}, "shared must be true or false"),
        ("refreekv", {"threshold": "many"}, "threshold"),
        ("refreekv", {"norm_includes_sinks": "no"}, "norm_includes_sinks must be true or false"),
        ("streaming-llm", {"ratio": "half"}, "ratio"),
        ("streaming-llm", {}, "exactly one of size= .* and ratio="),
        ("streaming-llm", {"size": 4, "ratio": 0.5}, "exactly one"),
        ("streaming-llm", {"ratio": 0.0}, r"ratio .* \(0, 1\]"),
        ("streaming-llm", {"ratio": 1.5}, r"ratio .* \(0, 1\]"),
        ("streaming-llm", {"size": 0}, "size must be an integer >= 1"),
    ],
)
def test_parameters_out_of_range(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        policies.create(name, **parameters)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'refreekv'"):
        policies.create("refreekw")
    with pytest.raises(TypeError, match=r"did you mean 'threshold'.*it has: threshold, sinks"):
        policies.create("refreekv", treshold=0.1)
    with pytest.raises(ValueError, match="`refreekv policies` lists them"):
        policies.create("completely-different")


@pytest.mark.parametrize(
    "spec",
    [
        "adaptive",
        "adaptive:constant=0.0004",
        "adaptive:window=32,shared=true,frozen_layers=all",
        "refreekv",
        "refreekv:threshold=0.05,probe_reduce=max,norm_includes_sinks=true",
        "snapkv:ratio=0.5",
        "streaming-llm:size=6",
        "full",
    ],
)
def test_a_policy_is_called_by_what_differs_from_the_defaults(spec):
    policy = policies.parse(spec)
    assert policy.spec == spec
    assert str(policy) != spec  # the name with all parameters is another one
    assert policies.parse(policies.parse(f"{policy.spec}").spec) == policy


def test_defaults_that_are_written_out_are_not_shown():
    assert policies.parse("adaptive:constant=0.0002,sinks=4").spec == "adaptive"


def test_parse_reads_what_the_command_line_takes():
    policy = policies.parse("refreekv:threshold=0.05,sinks=8,norm_includes_sinks=true,frozen_layers=all")
    assert policy == policies.create("refreekv", threshold=0.05, sinks=8, norm_includes_sinks=True, frozen_layers="all")
    assert policies.parse("streaming-llm:size=128").size == 128
    with pytest.raises(ValueError, match="not of the form name=value"):
        policies.parse("refreekv:0.5")


def test_a_ready_policy_takes_no_parameters():
    policy = policies.create("refreekv")
    assert policies.resolve(policy) is policy
    with pytest.raises(TypeError, match="go with a policy's name"):
        policies.resolve(policy, threshold=0.5)
    with pytest.raises(TypeError, match="must be a name or a Policy"):
        policies.resolve(3)


def test_a_name_may_bring_its_parameters():
    assert policies.resolve("snapkv:ratio=0.25") == policies.create("snapkv", ratio=0.25)
    assert policies.resolve("refreekv:threshold=0.5,sinks=8", threshold=0.05).threshold == 0.05


def test_one_file_adds_a_policy():
    """What CONTRIBUTING promises: a dataclass, select, register."""

    @policies.register("every-other")
    @dataclasses.dataclass(frozen=True)
    class EveryOther(Policy):
        """Keep every other token."""

        step: int = 2

        def select(self, view):
            columns = torch.arange(view.keys.shape[2])
            keep = view.real & (((columns + 1) % self.step == 0) | (columns == columns[-1]))
            return Selection(keep[:, None])

    try:
        assert policies.available()["every-other"] == "Keep every other token"
        assert kept(policies.create("every-other", step=3), view())[0].sum() == 14
        with pytest.raises(ValueError, match="registered already"):
            policies.register("every-other")(EveryOther)
    finally:
        del _POLICIES["every-other"]


def test_streaming_llm_counts_tokens_exactly():
    layer = view(n=100, batch=1)
    cases = [({"size": 10}, 10), ({"size": 500}, 100), ({"ratio": 0.29}, 29), ({"ratio": 0.001}, 5), ({"size": 1}, 1)]
    for parameters, count in cases:
        keep = kept(policies.create("streaming-llm", **parameters), layer)[0, 0]
        assert keep.sum() == count, parameters
        assert keep[-1]
    keep = kept(policies.create("streaming-llm", size=10), layer)[0, 0]
    assert keep.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 94, 95, 96, 97, 98, 99]
