"""Frozen weights packed by hand: what is packed, what it is read as, checkpoints, copies, moves, failures."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

from memopt.runtime import disk
from memopt.weights import CODECS, LEAST, pack_weights, packable, packed, unpack_weights
from tests.adapted import WIDTH, ids, read_as, tower


def test_what_is_packed_is_frozen_and_one_layers_own() -> None:
    model = tower(1)
    model.layers[0][2].base.weight.requires_grad_(True)
    assert list(packable(model)) == ["layers.0.0.base.weight"]
    model.again = nn.Linear(1, 1)
    model.again.weight = model.layers[0][0].base.weight
    assert not packable(model)


@pytest.mark.parametrize("codec", CODECS)
def test_packing_says_its_bytes_and_changes_no_key(codec: str) -> None:
    model = tower()
    keys = list(model.state_dict())
    done = pack_weights(model, codec)
    assert done.before == 6 * 2 * WIDTH * WIDTH * 4
    held = sum(b.nbytes for name, b in model.named_buffers() if "parametrizations" in name)
    assert held == done.after < done.before / {"nf4": 7, "int8": 3.8, "exponents": 1.1}[codec]
    assert sorted(model.state_dict()) == sorted(keys)
    assert not any("parametrizations" in name for name, _ in model.named_parameters())
    model.requires_grad_(True)  # what is stored is no parameter, so this goes


@pytest.mark.parametrize("codec", CODECS)
def test_a_checkpoint_of_packed_weights_goes_anywhere_and_comes_back_bit_for_bit(codec: str) -> None:
    model = tower()
    pack_weights(model, codec)
    plain, saved = read_as(model), model.state_dict()
    assert torch.equal(plain(ids()), model(ids()))
    held = {name: b.clone() for name, b in model.named_buffers()}
    model.load_state_dict(saved)
    assert all(torch.equal(held[name], b) for name, b in model.named_buffers())
    other = tower()
    pack_weights(other, codec)
    with torch.no_grad():
        plain.layers[0][0].base.weight.mul_(-2)
    other.load_state_dict(plain.state_dict())
    assert torch.allclose(other(ids()), plain(ids()), rtol=0.1)
    again = copy.deepcopy(model)
    assert torch.equal(again(ids()), model(ids()))


def test_weights_of_another_shape_are_refused_and_none_is_lost() -> None:
    model = tower(1)
    pack_weights(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = {**before, "layers.0.0.base.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match=r"layers\.0\.0\.base"):
        model.load_state_dict(wrong)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_unpacked_weights_are_parameters_again() -> None:
    model = tower()
    pack_weights(model)
    loss, state = model(ids()), model.state_dict()
    names = unpack_weights(model)
    assert len(names) == 6
    assert not any(packed(module) for module in model.modules())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in tower().named_parameters()}
    assert torch.equal(model(ids()), loss)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        model.layers[0][0].base.weight.zero_()  # and written into
    assert not bool(model.layers[0][0].base.weight.any())


def test_what_cannot_be_packed_is_refused_and_nothing_changed() -> None:
    with pytest.raises(ValueError, match="codec='int3' is not known; known are exponents, int8, nf4"):
        pack_weights(tower(), "int3")
    with pytest.raises(ValueError, match=f"no frozen matrix of {LEAST} elements or more"):
        pack_weights(nn.Linear(256, 256))
    model = tower()
    with torch.no_grad():
        model.layers[2][0].base.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.2\.0\.base\.weight is not finite"):
        pack_weights(model)
    assert not any(packed(module) for module in model.modules())


def test_a_disk_that_fails_while_weights_are_written_leaves_the_model_as_it_was(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, model = disk.use(tmp_path, 1 << 20), tower(4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    put, written = pool.put, [0]

    def full(data: memoryview, offset: int) -> None:
        written[0] += 1
        if written[0] > 3:
            raise disk.DiskError("no space left")
        put(data, offset)

    monkeypatch.setattr(pool, "put", full)
    own = dict(model.named_parameters())
    with pytest.raises(disk.DiskError, match="no space left"):
        pack_weights(model, pool.codec)
    assert written[0] == 4
    assert all(p is own[name] for name, p in model.named_parameters())
    assert not any(packed(module) for module in model.modules())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in tower(4).named_parameters()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert pool.held == 0


def test_a_copy_is_unpacked_by_itself() -> None:
    model = tower()
    pack_weights(model)
    loss, other = model(ids()), copy.deepcopy(model)
    unpack_weights(other)
    assert torch.equal(other(ids()), loss)
    assert torch.equal(model(ids()), loss)
    assert len(unpack_weights(model)) == 6
    assert torch.equal(model(ids()), loss)


def test_a_model_that_is_converted_reads_its_weights_converted() -> None:
    model = tower()
    pack_weights(model)
    model.to(torch.bfloat16)
    assert model.layers[0][0].base.weight.dtype is torch.bfloat16
    model(ids()).backward()


def test_weights_on_disk_outlive_a_move_of_their_layer(tmp_path: Any) -> None:
    pool, model = disk.use(tmp_path, 1 << 20), tower()
    want = model(ids())
    pack_weights(model, pool.codec)
    for module in model.modules():  # as `.cuda()` replaces buffers
        module._buffers.update({name: b.clone() for name, b in module._buffers.items() if b is not None})
    assert torch.equal(model(ids()), want)
    del model
    gc.collect()
    assert pool.held == 0
