"""Merging methods: worked by hand, or compared with fusion_bench's, or with their equations in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import DynamicCache

from studies import merge


class TestByHand:
    """Two task vectors of four entries, split over two parameters."""

    def vectors(self) -> dict[str, torch.Tensor]:
        return {
            "weight": torch.tensor([[[1.0, -2.0]], [[3.0, 4.0]]]),
            "bias": torch.tensor([[0.5, -0.1], [-0.2, -5.0]]),
        }

    def test_task_vectors_leave_out_what_did_not_change(self):
        base = nn.Linear(2, 1)
        tuned = merge.add_to(base, {"weight": torch.tensor([[1.0, 0.0]])})
        vectors = merge.task_vectors(base, [tuned, base])
        assert list(vectors) == ["weight"]
        torch.testing.assert_close(vectors["weight"], torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]]))

    def test_task_arithmetic(self):
        change = merge.task_arithmetic(self.vectors(), 0.5)
        torch.testing.assert_close(change["weight"], torch.tensor([[2.0, 1.0]]))
        torch.testing.assert_close(change["bias"], torch.tensor([0.15, -2.55]))

    def test_ties(self):
        # Half of (1, -2, 0.5, -0.1) is (1, -2, 0, 0); of (3, 4, -0.2, -5), (0, 4, 0, -5).
        # Signs of the sums (1, 2, 0, -5): +, +, none, -. Means of what agrees: 1, 4, 0, -5.
        change = merge.ties(self.vectors(), density=0.5, scale=2.0)
        torch.testing.assert_close(change["weight"], torch.tensor([[2.0, 8.0]]))
        torch.testing.assert_close(change["bias"], torch.tensor([0.0, -10.0]))

    def test_ties_divides_by_those_that_agree(self):
        # Nothing is trimmed. Sums (4, 2, 0.3, -5.1): 1 and 3 agree, only 4 is positive, only 0.5, both of the last.
        change = merge.ties(self.vectors(), density=1.0, scale=1.0)
        torch.testing.assert_close(change["weight"], torch.tensor([[2.0, 4.0]]))
        torch.testing.assert_close(change["bias"], torch.tensor([0.5, -2.55]))

    def test_the_base_is_not_changed(self):
        base = nn.Linear(2, 1)
        before = base.weight.clone()
        merged = merge.add_to(base, {"weight": torch.ones(1, 2)})
        torch.testing.assert_close(base.weight, before)
        torch.testing.assert_close(merged.weight, before + 1)


class Tiny(nn.Module):
    """Two linear layers around a GELU, with an offset outside of layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.offset = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor, attention_mask: object = None, cache: object = None) -> torch.Tensor:
        return self.second(nn.functional.gelu(self.first(x))) + self.offset


@pytest.fixture
def base() -> Tiny:
    return Tiny().requires_grad_(False)


@pytest.fixture
def finetuned(base) -> list[Tiny]:
    changes = [{name: 0.3 * torch.randn_like(p) for name, p in base.named_parameters()} for _ in range(3)]
    return [merge.add_to(base, change) for change in changes]


@pytest.fixture
def vectors(base, finetuned) -> dict[str, torch.Tensor]:
    return merge.task_vectors(base, finetuned)


def assert_same(change: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert list(change) == list(want)
    for name, delta in change.items():
        torch.testing.assert_close(delta, want[name].to(delta), rtol=1e-4, atol=1e-5)


class TestBesideFusionBench:
    """Each method and fusion_bench's, on the same models."""

    def per_task(self, vectors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [{name: tau[i].clone() for name, tau in vectors.items()} for i in range(3)]

    def test_tsv_merge(self, vectors):
        from fusion_bench.method.task_singular_vector.utils import TSVM_utils as theirs

        want = theirs.compute_and_sum_svd_mem_reduction(self.per_task(vectors), accelerator="cpu")
        assert_same(merge.tsv(vectors), want)

    def test_iso_c(self, vectors):
        from fusion_bench.method.isotropic_merging import iso_utils as theirs

        assert_same(merge.isotropic(vectors), theirs.iso_c(self.per_task(vectors), accelerator="cpu"))

    def test_fisher_merging(self, base, finetuned, vectors):
        from fusion_bench.method.fisher_merging import fisher_merging as theirs

        information = [{name: torch.rand_like(tau[0]) * 1e-3 for name, tau in vectors.items()} for _ in range(3)]
        values = {name: [module.get_parameter(name) for module in finetuned] for name in vectors}
        want = theirs.merging_with_fisher_weights(values, information, torch.ones(3) / 3)
        ours = merge.add_to(base, merge.fisher(vectors, information))
        assert_same(dict(ours.named_parameters()), {n: want[n] for n, _ in ours.named_parameters()})

    @pytest.mark.parametrize("keep", [1.0, 0.9])
    def test_regmean(self, base, finetuned, vectors, keep):
        from fusion_bench.method.regmean import regmean as theirs

        texts = [[torch.randn(1, 30, 6) for _ in range(4)] for _ in finetuned]
        grams = [merge.grams(m, ({"x": x} for x in of)) for m, of in zip(finetuned, texts)]
        want_grams = []
        for module, of in zip(finetuned, texts):
            x = torch.cat(of, dim=1)[0]
            hidden = nn.functional.gelu(module.first(x))
            want_grams.append({"first": x.T @ x / 120, "second": hidden.T @ hidden / 120})
        for ours, want in zip(grams, want_grams):
            assert_same(ours, want)
        values = {name: [module.get_parameter(name) for module in finetuned] for name in vectors}
        want = theirs.merging_with_regmean_weights(values, want_grams, reduce_non_diagonal_ratio=keep)
        ours = merge.add_to(base, merge.regmean(vectors, grams, keep))
        assert_same(dict(ours.named_parameters()), {n: want[n] for n, _ in ours.named_parameters()})

    @pytest.mark.parametrize("by_layer", [False, True])
    def test_adamerging_and_its_adaptation(self, base, finetuned, vectors, by_layer):
        from fusion_bench.method.adamerging.entropy_loss import entropy_loss
        from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel

        x, count = torch.randn(5, 6), len(vectors)
        weights = torch.rand(3, count if by_layer else 1)
        full = weights.expand(-1, count).clone()
        theirs = LayerWiseMergedModel(
            full, copy.deepcopy(base).requires_grad_(True), copy.deepcopy(finetuned), clamp_weights=False
        )
        optimiser = torch.optim.Adam([theirs.merge_weight], lr=0.1)
        ours = weights.clone().requires_grad_(True)

        def losses():
            theta = {n: base.get_parameter(n) + d for n, d in merge.weighted(vectors, ours).items()}
            yield merge.entropy(functional_call(base, theta, (x,)))

        for step in merge.adapt([ours], losses, 0.1):
            theirs.merge_weights()
            loss = entropy_loss(theirs(x), eps=0)
            optimiser.zero_grad()
            loss.backward()
            if not by_layer:  # one weight for all layers of a task
                theirs.merge_weight.grad[:] = theirs.merge_weight.grad.sum(1, keepdim=True)
            optimiser.step()
            torch.testing.assert_close(ours.expand(-1, count), theirs.merge_weight, rtol=1e-3, atol=1e-4)
            if step == 3:
                return

    def test_weight_ensembling(self, base, finetuned, vectors):
        from fusion_bench.models.we_moe import WeightEnsemblingMoE

        ours = merge.weight_ensembling(base, vectors, [("first", "second")], 0.3)
        gate = ours.first.gate
        assert gate is ours.second.gate
        assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
            f"first.gate.{n}" for n, _ in gate.named_parameters()
        ]
        nn.init.normal_(gate.fc1.weight)
        nn.init.normal_(gate.fc2.weight)
        # What is outside of the MLPs is merged by task arithmetic: theirs gets it as it will be.
        outside = [merge.add_to(m, {"offset": base.offset - m.offset}) for m in finetuned]
        merged = merge.add_to(base, {"offset": 0.3 * vectors["offset"].sum(0)})
        for module in outside:
            module.offset.data.copy_(merged.offset)
        theirs = WeightEnsemblingMoE(6, copy.deepcopy(merged).requires_grad_(True), outside, 0.3, batch_first=True)
        theirs.gate.load_state_dict(gate.state_dict())
        x = torch.randn(4, 5, 6)
        whole = ours(x, attention_mask=torch.ones(4, 5, dtype=torch.bool))
        torch.testing.assert_close(whole, theirs(x), rtol=1e-4, atol=1e-5)
        padded, mask = torch.cat([x, torch.randn(4, 2, 6)], dim=1), torch.arange(7).expand(4, 7) < 5
        torch.testing.assert_close(ours(padded, attention_mask=mask)[:, :5], whole, rtol=1e-4, atol=1e-5)
        again = merge.with_own_gates(ours)
        assert again.first.tau is ours.first.tau
        nn.init.zeros_(gate.fc2.weight)
        torch.testing.assert_close(again(padded, attention_mask=mask)[:, :5], whole, rtol=1e-4, atol=1e-5)

    def test_a_text_is_continued_with_its_weights(self, base, vectors):
        """Without a bias; the last two of five tokens in a pass of their own, the first three in a KV cache."""
        vectors = {name: tau for name, tau in vectors.items() if name != "second.bias"}
        ours = merge.weight_ensembling(base, vectors, [("first", "second")], 0.3)
        nn.init.normal_(ours.first.gate.fc2.weight)
        x, cache = torch.randn(4, 5, 6), DynamicCache()
        cache.update(torch.ones(4, 1, 3, 2), torch.ones(4, 1, 3, 2), 0)
        with pytest.raises(ValueError, match="x: continues 4 texts; expected the 0 of the pass before"):
            ours(x[:, 3:], attention_mask=None, cache=cache)
        ours(x[:, :3], attention_mask=None, cache=DynamicCache())
        with pytest.raises(ValueError, match="x: continues 1 texts; expected the 4 of the pass before"):
            ours(x[:1, 3:], attention_mask=None, cache=cache)
        rest = ours(x[:, 3:], attention_mask=None, cache=cache)
        gate = ours.first.gate
        for i, w in enumerate(gate.fc2(gate.fc1(x[:, :3]).relu()).mean(1)):
            change = {name: torch.tensordot(w, tau, dims=1) for name, tau in vectors.items() if name != "offset"}
            want = merge.add_to(base, {**change, "offset": 0.3 * vectors["offset"].sum(0)})(x[i, 3:])
            torch.testing.assert_close(rest[i], want, rtol=1e-4, atol=1e-5)


def test_fisher_information_is_that_of_the_equation():
    """Of a linear classifier, d log p_y / d W = (e_y - p) x^T; in float64."""
    weight, texts = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    found = merge.fisher_information(lambda theta, x: (theta["w"] @ x).log_softmax(-1), {"w": weight}, texts)
    want = torch.zeros(3, 4, dtype=torch.float64)
    for x in texts:
        p = (weight @ x).softmax(-1)
        for y in range(3):
            want += p[y] * torch.outer(torch.eye(3, dtype=torch.float64)[y] - p, x).square() / 5
    torch.testing.assert_close(found["w"], want)
