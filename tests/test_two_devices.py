"""Source and target on different devices. There is one here, so the passes of every phase run on tensors without
values, the source's on one device and the target's on another; PyTorch refuses whatever mixes them."""

import pytest
import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

import peft_cast
from peft_cast.align.batches import collate_pairs
from peft_cast.align.depth import map_layers
from peft_cast.align.modules import map_modules
from peft_cast.fit.install import cast_config
from peft_cast.models.heads import shared_head
from peft_cast.models.loading import skeleton
from peft_cast.options import Training
from peft_cast.planning.fake import materialize
from peft_cast.planning.passes import closed_form_costs, refinement_costs, texts_of
from peft_cast.refine.losses import normalized_mse
from peft_cast.refine.teacher import Teacher
from peft_cast.source.kernels import LoraKernel
from peft_cast.source.loading import adapted_source
from peft_cast.utils import distributed


# Of the devices that tensors without values can be on, the one that a CPU's PyTorch can differentiate on.
THERE = "meta"
VOCABULARY = 300


@pytest.fixture
def pair(source_folder, lora_folder, target_folder):
    """The adapted source on another device than the target with its adapter, kernels, and where they land."""
    on, onto = (skeleton(AutoConfig.from_pretrained(folder)) for folder in (source_folder, target_folder))
    on, onto = (model.eval().requires_grad_(False) for model in (on, onto))
    with adapted_source(on, lora_folder) as read:
        kernels = dict(read.kernels)
        modules = map_modules(kernels, onto, map_layers(3, 2, "proportional"), None, on)
        model = get_peft_model(onto, cast_config(kernels, modules), low_cpu_mem_usage=True)
        with FakeTensorMode(allow_non_fake_inputs=True):
            materialize(read.model, THERE)
            materialize(model)
            there = {name: LoraKernel(k.A.to(THERE), k.B.to(THERE), k.scaling) for name, k in kernels.items()}
            assert read.model.device.type == THERE and model.device.type == "cpu"
            yield read.model, model, there, modules


def test_the_closed_form_keeps_them_apart(pair):
    source, model, kernels, modules = pair
    batch = collate_pairs(texts_of(2, 12, 0.9))
    with source.disable_adapter(), model.disable_adapter():
        costs = closed_form_costs(source.get_base_model(), model.get_base_model(), batch, VOCABULARY, kernels, modules)
    assert all(cost.kept > 0 for cost in costs[1:])


@pytest.mark.parametrize(
    "settings", [{}, {"teacher_top_k": None}, {"teacher": 0.5}, {"teacher": 0.5, "teacher_top_k": None}]
)
def test_teacher_and_student_keep_them_apart(pair, settings):
    source, model, *_ = pair
    costs = refinement_costs(source, model, 4, 0.9, VOCABULARY, Training(**settings), 6, 12, 1)
    assert all(cost.flops > 0 for cost in costs)


def test_hidden_states_and_excitement_keep_them_apart(pair):
    source, model, *_ = pair
    widths = [m.config.hidden_size for m in (model, source)]
    maps = {"model.layers.0": ("model.layers.1", torch.empty(widths[0], widths[1] + 1))}
    teacher = Teacher(source, Training(beta=0.1, teacher=0.5, gamma=0.0), maps)
    batch, ids = collate_pairs(texts_of(2, 12, 0.9)), torch.arange(VOCABULARY)
    with shared_head(source.get_base_model(), ids), shared_head(model.get_base_model(), ids):
        _, goals = teacher.goals(model, batch)
        _, states = teacher.student(model, model, batch)
    assert normalized_mse(states["model.layers.0"], goals["model.layers.0"]).device.type == "cpu"
    assert teacher.excitement(model, batch).device.type == THERE


def test_what_mixes_them_is_refused_here(pair):
    there = pair[0].get_base_model().get_output_embeddings().weight
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.empty_like(there, device="cpu")


def test_translate_and_its_like_take_it(source_folder, lora_folder, target_folder, monkeypatch):
    places = []
    monkeypatch.setattr("peft_cast.source.pair.load_source", lambda *a, device, **o: places.append(device) or 1 / 0)
    monkeypatch.setattr("peft_cast.source.pair.load_model", lambda *a, device, **o: places.append(device) or 1 / 0)
    monkeypatch.setattr(distributed, "resolve_device", lambda asked, name="device": torch.device(asked or "cpu"))
    for verb in (peft_cast.translate, peft_cast.baselines.distill_lora):
        with pytest.raises(ZeroDivisionError):
            verb(source_folder, lora_folder, target_folder, text=["a text " * 9] * 3, source_device="cuda:1")
    with pytest.raises(ZeroDivisionError):
        peft_cast.fit_bridge(source_folder, target_folder, text=["a text " * 9] * 3, source_device="cuda:1")
    assert places == [torch.device("cuda:1")] * 3


def test_a_device_that_is_not_there_or_several_processes_are_refused(source_folder, monkeypatch):
    with pytest.raises(ValueError, match="`source_device` is 'cuda:1', but PyTorch finds no accelerator"):
        peft_cast.translate(source_folder, "nowhere", "nowhere", source_device="cuda:1")
    monkeypatch.setattr(distributed, "launched_processes", lambda: 2)
    with pytest.raises(ValueError, match="`source_device` is for one process"):
        peft_cast.translate(source_folder, "nowhere", "nowhere", source_device="cpu")
