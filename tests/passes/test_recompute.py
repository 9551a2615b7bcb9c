"""What recompute offers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from memopt.edit import edit
from memopt.graph import verify
from memopt.passbase import Numerics
from memopt.passes.recompute import Recompute
from memopt.solvers.blocks import find_blocks
from memopt.timeline import peak
from tests.synthetic import llama, random_step, unet


def test_blocks_are_the_layers_and_regions_are_disjoint() -> None:
    graph, _ = llama(8)
    blocks = find_blocks(graph)
    lengths = [b - a for a, b in pairwise(blocks.starts)]
    assert len(blocks.starts) == 10  # embedding to the first cut, seven times a layer, what remains, the head
    assert len(set(lengths[1:8])) == 1
    spans = sorted(region for region in blocks.regions if region is not None)
    assert spans[0][0] == graph.boundary
    assert spans[-1][1] == len(graph.steps) - 1
    assert all(a[1] + 1 == b[0] for a, b in pairwise(spans))


def test_a_unet_is_cut_although_nothing_repeats() -> None:
    assert len([r for r in find_blocks(unet()[0]).regions if r]) >= 4


def test_every_offer_can_be_taken_at_once() -> None:
    for graph, seconds in (llama(4), unet(), *(random_step(seed) for seed in range(50))):
        offers = Recompute().propose(graph, seconds)
        assert len({(offer.value, offer.span) for offer in offers}) == len(offers)
        verify(edit(graph, offers))
    assert Recompute.numerics is Numerics.EXACT


def test_taking_all_offers_shrinks_a_llama_step() -> None:
    graph, seconds = llama(8)
    assert peak(edit(graph, Recompute().propose(graph, seconds))) < 0.5 * peak(graph)


def test_impure_values_inputs_and_outputs_are_never_offered() -> None:
    for seed in range(80):
        graph, seconds = random_step(seed)
        values = {offer.value for offer in Recompute().propose(graph, seconds)}
        impure = {graph.storage_of(w) for step in graph.steps if not step.pure for w in step.writes}
        assert not values & (impure | {*graph.input_storages, *graph.output_storages})


def test_a_value_the_backward_only_views_is_offered() -> None:
    """x.t() of a saved x, as in every weight's gradient, is no write: forward values must not be kept for it."""
    graph, seconds = llama(4)
    late = [step for step in graph.steps[graph.boundary :] if graph.is_view(step)]
    viewed = {
        graph.storage_of(r) for step in late for r in step.reads if graph.producer.get(r, 0) in range(1, graph.boundary)
    }
    kept = set(graph.output_storages) | set(graph.input_storages)
    assert viewed - kept
    assert viewed - kept <= {offer.value for offer in Recompute().propose(graph, seconds)}


def test_shared_tables_are_offered_to_every_layer() -> None:
    graph, seconds = llama(6)
    assert sum(offer.value == "rotary.cos" for offer in Recompute().propose(graph, seconds)) >= 6


def test_longest_leaves_slow_steps_alone() -> None:
    graph, seconds = llama(4)
    longest = sorted(seconds.values())[len(seconds) // 2]
    offers = Recompute(longest=longest).propose(graph, seconds)
    assert offers
    assert max(offer.seconds for offer in offers) <= longest


def test_a_draw_made_again_holds_two_states_of_the_generator() -> None:
    graph, seconds = llama(2)
    offer = next(offer for offer in Recompute().propose(graph, seconds) if offer.value == "l0.norm1")
    draw = replace(offer.unpack[0], advances=True, workspace=3)
    drawn = replace(graph, steps=tuple(draw if step.name == draw.name else step for step in graph.steps))
    after = edit(drawn, (replace(offer, unpack=(draw,)),))
    (copy,) = (step for step in after.steps if step.name == f"{draw.name}__1")
    assert copy.workspace == 3 + graph.bytes_of(draw.reads[:1])
