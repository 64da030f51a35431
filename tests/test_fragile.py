"""What we lean on in libraries though nobody promised it: each place by name.

A failure here says which function of ours relies on what a new version has moved.
"""

import os
import inspect
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tiny_families import tiny_model

from halos_nb import attention, generate, head, reference
from halos_nb.configs import TrainConfig
from halos_nb.loop import TRACKERS
from halos_nb.models import (
    REFERENCE,
    TreePolicy,
    add_lora,
    attention_name,
    evaluating,
    load_policy,
    mix_in,
    small_llama,
)
from halos_nb.templates import byte_tokenizer
from halos_nb.trees import Tree, make_batch
from halos_nb.tree_trainer import Schedule
from halos_nb.train import make_trainer

# ---- transformers.Trainer, for halos_nb.tree_trainer

TRAINER_HOOKS = {
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_save_checkpoint": ["self", "model", "trial"],
    "store_flos": ["self"],
    "get_train_dataloader": ["self"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "floating_point_ops": ["self", "inputs"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["self", "logs", "start_time"],
}


def moved(name, what):
    return (
        f"transformers {transformers.__version__}: {what}; "
        f"see {name} in halos_nb.tree_trainer, which relies on it"
    )


@pytest.mark.parametrize("name", TRAINER_HOOKS)
def test_trainer_has_the_method_as_we_know_it(name):
    method = getattr(Trainer, name, None)
    assert method is not None, moved(name, f"Trainer.{name} is gone")
    parameters = list(inspect.signature(method).parameters)
    known = TRAINER_HOOKS[name]
    assert parameters[: len(known)] == known, moved(name, f"Trainer.{name} takes {parameters}")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A tiny model and four pairs."
    home, tok = tmp_path_factory.mktemp("fragile"), byte_tokenizer()
    small_llama(tok, hidden_size=32, initializer_range=0.2).save_pretrained(home / "start")
    tok.save_pretrained(home / "start")
    with open(home / "pairs.jsonl", "w") as file:
        for i in range(4):
            row = dict(prompt=f"Say {i}", chosen="Yes" + "!" * i, rejected="No.")
            file.write(json.dumps(row) + "\n")
    return home


def dpo_trainer(home, **more):
    "A trainer of two steps, ready to start."
    cfg = TrainConfig(
        loss="dpo",
        model=str(home / "start"),
        train_datasets=[str(home / "pairs.jsonl")],
        batch_size=2,
        lr=1e-2,
        warmup=0,
        cache_dir=str(home),
        exp_name="dpo",
        **more,
    )
    return make_trainer(cfg)


def test_the_settings_of_ddp_reach_it(home):
    "Its gradients are its buckets, so there is no second copy of them."
    settings = dpo_trainer(home).trainer.accelerator.ddp_handler.to_kwargs()
    what = "the settings of DDP are not in the Accelerator's ddp_handler"
    assert settings["gradient_as_bucket_view"], moved("keep_gradients_in_buckets", what)


class StepRecorder(TrainerCallback):
    "Notes what Trainer does, in order."

    def __init__(self, notes):
        self.notes = notes

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kw):
        ready = optimizer is not None and lr_scheduler is not None
        self.notes.append("begin, ready" if ready else "begin, not ready")

    def on_optimizer_step(self, args, state, control, **kw):
        self.notes.append("optimizer")

    def on_step_end(self, args, state, control, **kw):
        self.notes.append("end")


@pytest.fixture(scope="module")
def notes(home):
    "The order in which Trainer calls what we override, over two steps."
    trainer, _ = dpo_trainer(home)
    notes = []
    for name in ("get_batch_samples", "training_step", "_get_grad_norm"):
        own = getattr(trainer, name)

        def noted(*args, name=name, own=own, **kw):
            notes.append(name)
            return own(*args, **kw)

        setattr(trainer, name, noted)
    trainer.add_callback(StepRecorder(notes))
    trainer.train()
    return notes


def test_a_step_is_fetched_computed_checked_and_taken(notes):
    "The gradient is checked behind backward and in front of the optimiser."
    order = ["get_batch_samples", "training_step", "_get_grad_norm", "optimizer", "end"]
    assert notes[1:] == 2 * order, moved("_get_grad_norm", f"its loop is {notes[1:]}")


def test_optimizer_and_scheduler_are_there_when_training_begins(notes):
    "When Timetable.on_train_begin reads the moments of the round before."
    assert notes[0] == "begin, ready", moved("Timetable", "on_train_begin comes too early")


def test_the_training_state_goes_round(home, tmp_path):
    "What is saved is what is read: moments and schedule."
    trainer, _ = dpo_trainer(home)
    trainer.train()
    trainer.save_training_state(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert {"optimizer.pt", "scheduler.pt"} <= files, moved("save_training_state", str(files))
    again, _ = dpo_trainer(home)
    again.create_optimizer_and_scheduler(num_training_steps=2)
    again.load_training_state(tmp_path)
    want = trainer.optimizer.state_dict()["state"]
    got = again.optimizer.state_dict()["state"]
    assert got.keys() == want.keys() and got, moved(
        "load_training_state", "no moments are read"
    )
    for number in want:
        assert torch.equal(got[number]["exp_avg"], want[number]["exp_avg"])
    assert again.lr_scheduler.last_epoch == 2, moved(
        "load_training_state", "no schedule is read"
    )


def test_the_state_is_read_without_pickle():
    "Trainer reads tensors only."
    source = inspect.getsource(Trainer._load_optimizer_and_scheduler)
    reads = source.count("torch.load(")
    safe = source.count("weights_only=True")
    assert reads <= safe, moved("load_training_state", "torch.load without weights_only=True")


def test_trainer_puts_its_arguments_beside_the_weights(home, tmp_path):
    "A pickle, which save_whole_model takes away."
    trainer, _ = dpo_trainer(home)
    trainer.save_whole_model(tmp_path)
    kinds = {file.suffix for file in tmp_path.iterdir()}
    assert kinds <= {".json", ".safetensors", ".jinja"}, moved("save_whole_model", str(kinds))
    load_policy(str(tmp_path))


def test_schedule_and_precision_are_ours(home):
    "Trainer asks for our schedule and steps it; its own Accelerator casts nothing."
    trainer, _ = dpo_trainer(home)
    trainer.train()
    assert isinstance(trainer.lr_scheduler.lr_lambdas[0], Schedule), moved(
        "create_scheduler", "another schedule"
    )
    steps = trainer.state.global_step
    assert trainer.lr_scheduler.last_epoch == steps, moved("create_scheduler", "not stepped")
    said = trainer.accelerator.mixed_precision
    assert said == "no", moved("training_arguments", f"Accelerate computes in {said}")


def test_the_trackers_are_those_that_the_loop_knows():
    "loop.check_trackers looks for their packages before anything is started."
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(INTEGRATION_TO_CALLBACK) <= set(TRACKERS)


def test_a_callback_asks_for_an_evaluation(home):
    "Timetable.on_step_end sets control.should_evaluate, and Trainer evaluates once."
    assert TrainerControl().should_evaluate is False
    trainer, _ = dpo_trainer(home, test_datasets=[str(home / "pairs.jsonl")], eval_every=1)
    seen = []
    trainer.evaluate = lambda *a, **kw: seen.append(trainer.state.global_step) or {}
    trainer.train()
    # the last step is evaluated by train(), not by the timetable
    assert seen == [1], moved("Timetable", f"evaluations at {seen}")


def test_a_checkpoint_has_what_a_round_needs(home):
    trainer, tokenizer = dpo_trainer(home)
    trainer.train()
    folder = trainer.save_final(home / "FINAL", tokenizer)
    files = {file.name for file in Path(folder).iterdir()}
    needed = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert needed <= files, moved("save_checkpoint", f"it wrote {sorted(files)}")


# ---- transformers' models, for halos_nb.attention and halos_nb.models

TREES = [
    Tree([9, 8, 7, 6], [[20, 21, 22], [30, 31]], ["chosen", "rejected"], [0, 0]),
    Tree([5, 4], [[50, 51]], ["completion"], [0]),
]


def changed(library, room, name, what):
    "What a new version of a library has moved, and who relies on it."
    return f"{library.__name__} {library.__version__}: {what}; see {name} in halos_nb.{room}"


def model_changed(name, what):
    return changed(transformers, "models", name, what)


def attention_changed(name, what):
    return changed(transformers, "attention", name, what)


@pytest.fixture
def model():
    "A plain model of transformers, two layers, nothing of ours mixed in."
    return small_llama(byte_tokenizer(), hidden_size=32, initializer_range=0.3).eval()


def test_a_fresh_model_attends_by_sdpa_and_says_so(model):
    assert hasattr(model.config, "_attn_implementation"), model_changed(
        "attention_name", "configs have no _attn_implementation"
    )
    assert attention_name(model.config) == "sdpa", model_changed(
        "why_not_trees", f"a fresh model's attention is {attention_name(model.config)!r}"
    )


def test_a_model_s_class_can_be_exchanged_and_its_config_stays(model):
    own = type(model)
    before = model.config.to_dict()
    mixed = mix_in(model, TreePolicy)
    assert mixed.config.to_dict() == before
    assert isinstance(mixed, own) and isinstance(mixed, TreePolicy), model_changed(
        "mix_in", "a model's class cannot be exchanged"
    )


def test_tree_attention_stands_in_the_place_of_sdpa():
    for table in (AttentionInterface(), ALL_ATTENTION_FUNCTIONS):
        assert table["sdpa"] is attention.tree_attention, attention_changed(
            "register_attention", f"{type(table).__name__} does not keep what is registered"
        )


def test_without_segments_it_is_sdpa_to_the_bit():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    layer = torch.nn.Identity()
    layer.is_causal = True
    ours, _ = attention.tree_attention(layer, q, k, v, None, scaling=0.3)
    theirs, _ = attention.sdpa_attention_forward(layer, q, k, v, None, scaling=0.3)
    assert torch.equal(ours, theirs)
    assert ours.shape == (2, 7, 4, 8)


def test_what_a_model_is_called_with_reaches_every_layer(model):
    "The row of trees, and the 4-D placeholder instead of a mask of transformers' own."
    calls = []

    def spy(module, query, key, value, attention_mask, **options):
        calls.append((attention_mask, options.get("tree_row")))
        return attention.tree_attention(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("sdpa", spy)
    batch = make_batch(TREES)
    try:
        attention.hidden_states(model, batch, batch.predict)
    finally:
        attention.register_attention()
    assert len(calls) == model.config.num_hidden_layers, attention_changed(
        "register_attention", f"{len(calls)} calls of a registered attention in two layers"
    )
    for mask, row in calls:
        assert row.segments is batch.segments and mask.tree_row is row, attention_changed(
            "tree_arguments", "unknown keywords do not reach the attention"
        )
        assert mask.shape == (1, 1, 1, batch.input_ids.shape[1]), attention_changed(
            "tree_arguments", f"a 4-D mask is not passed on, but {tuple(mask.shape)}"
        )


def test_sdpa_s_own_functions_take_what_we_give():
    known = ["module", "query", "key", "value", "attention_mask", "dropout", "scaling"]
    takes = list(inspect.signature(attention.sdpa_attention_forward).parameters)
    assert takes[: len(known)] == known, attention_changed(
        "tree_attention", f"sdpa_attention_forward takes {takes}"
    )
    heads = torch.arange(2.0).view(1, 2, 1, 1)
    repeated = attention.repeat_kv(heads, 2).flatten().tolist()
    assert repeated == [0, 0, 1, 1], attention_changed(
        "by_pieces", f"repeat_kv orders heads as {repeated}"
    )


def test_layers_say_how_many_heads_share_a_key(model):
    layer = model.base_model.layers[0].self_attn
    assert layer.num_key_value_groups == 1, attention_changed(
        "by_pieces", "num_key_value_groups means something else"
    )


def test_a_mixed_model_is_saved_as_what_it_is(model, tmp_path):
    mix_in(model, TreePolicy).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"], model_changed(
        "mix_in", f"config.json names {saved['architectures']}"
    )
    assert type(LlamaForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM


def test_the_hub_s_cache_is_read_for_its_commit():
    commit = "0123456789abcdef" * 2 + "01234567"
    file = f"/hub/models--someone--small/snapshots/{commit}/config.json"
    assert reference.extract_commit_hash(file, None) == commit, changed(
        transformers, "reference", "hub_commit", "extract_commit_hash reads paths otherwise"
    )


# ---- torch, for halos_nb.attention


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_where_we_look_for_them(register):
    layer = torch.nn.Linear(2, 2)
    assert not head.has_hooks(layer)
    handle = getattr(layer, register)(lambda *args: None)
    assert head.has_hooks(layer), changed(
        torch, "head", "has_hooks", f"{register} keeps its hooks elsewhere"
    )
    handle.remove()
    assert not head.has_hooks(layer)


def test_a_function_s_context_is_its_node_in_the_graph():
    "What head_gradients takes from it is given back before the layers go backward."
    layer = torch.nn.Linear(3, 5)
    x = torch.randn(4, 3, requires_grad=True)
    node = head.head_logps(layer, x, torch.zeros(4, dtype=torch.long)).logps.grad_fn
    assert hasattr(node, "memory") and hasattr(node, "last"), changed(
        torch, "head", "HeadLogps", "attributes of ctx are kept elsewhere"
    )


# ---- peft, for halos_nb.models and halos_nb.reference


def peft_changed(room, name, what):
    return changed(peft, room, name, what)


@pytest.fixture
def lora(model):
    return add_lora(mix_in(model, TreePolicy), r=2, alpha=4, dropout=0.0)


def test_an_adapter_is_called_default_and_its_weights_say_so(lora):
    assert list(lora.peft_config) == ["default"], peft_changed(
        "models", "save_adapter", f"the first adapter is called {list(lora.peft_config)}"
    )
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert trained and all(".default." in name for name in trained), peft_changed(
        "reference", "FrozenAdapter.weights", f"weights are called {trained[:1]}"
    )


def test_a_second_adapter_has_the_names_of_the_first(lora):
    own = reference.make_reference(lora, lora=True, sync=True)
    trained = [p for p in lora.parameters() if p.requires_grad]
    assert len(own.weights()) == len(trained) > 0, peft_changed(
        "reference", "FrozenAdapter.weights", f"{len(own.weights())} pairs of weights"
    )
    assert REFERENCE in lora.peft_config, peft_changed(
        "models", "merge_lora", "peft_config does not list a second adapter"
    )


def test_flags_that_switching_moves_are_put_back(lora):
    "The reason why a reference pass keeps requires_grad."
    lora.add_adapter(REFERENCE, lora.peft_config["default"])
    lora.set_adapter("default")
    before = [p.requires_grad for p in lora.parameters()]
    with evaluating(lora):
        lora.set_adapter(REFERENCE)
        lora.set_adapter("default")
    assert [p.requires_grad for p in lora.parameters()] == before


def test_layers_are_listed_as_a_set_that_can_be_sorted(lora):
    names = lora.peft_config["default"].target_modules
    assert isinstance(names, set | list), peft_changed(
        "models", "save_adapter", f"target_modules is {type(names).__name__}"
    )


# ---- JupyterLab's kernel and widgets, for halos_nb.monitor and halos_nb.widgets


def test_a_comm_chooses_its_thread_by_the_method_that_we_take_away():
    "Else a press of Stop waits for the cell to end."
    import ipykernel
    from ipykernel.comm.comm import BaseComm
    from ipykernel.kernelbase import Kernel

    route = getattr(Kernel, "shell_channel_thread_main", None)
    if route is None or "get_comm(" not in inspect.getsource(route):
        return  # this version sends a widget's messages where the front end wants them
    where = (
        f"ipykernel {ipykernel.__version__}: a comm's messages are routed in another way; "
        "see answer_while_busy in halos_nb.monitor, which relies on it"
    )
    assert 'getattr(comm, "_reply_subshell_for", None)' in inspect.getsource(route), where
    assert callable(getattr(BaseComm, "_reply_subshell_for", None)), where


def test_a_comm_lets_itself_be_told():
    from ipykernel.comm.comm import BaseComm
    from halos_nb.monitor import answer_while_busy

    class Widget:
        comm = BaseComm(target_name="test", primary=False)

    answer_while_busy(Widget)
    assert Widget.comm._reply_subshell_for is None


def test_anywidget_sends_script_and_style_and_shows_a_bundle():
    "MessageWidget adds a form without a kernel to what anywidget displays."
    import anywidget
    from halos_nb.monitor import Panel
    from halos_nb.show import static_text

    where = f"anywidget {anywidget.__version__}: see Panel and MessageWidget._repr_mimebundle_"
    panel = Panel()
    state = panel.get_state()
    assert state["_esm"] == static_text("charts.js") + static_text("monitor.js"), where
    assert state["_css"] == static_text("charts.css") + static_text("monitor.css"), where
    data, metadata = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data, where
    assert isinstance(metadata, dict), where


@pytest.mark.parametrize("room, name", [("monitor", "Stopped"), ("widgets", "LabelsMissing")])
def test_ipython_shows_what_an_error_renders(room, name, capsys):
    "One line, no traceback."
    import IPython
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell(f"from halos_nb.{room} import {name}\nraise {name}('on purpose')")
    said = "".join(capsys.readouterr())
    where = f"IPython {IPython.__version__}: see {name}._render_traceback_ in halos_nb.{room}"
    assert "on purpose" in said, where
    assert "Traceback" not in said, where


# ---- transformers' cache and the names of a forward pass, for halos_nb.generate


def cache_moved(name, what):
    return (
        f"transformers {transformers.__version__}: {what}; "
        f"see {name} in halos_nb.generate, which relies on it"
    )


def test_a_layer_of_the_cache_is_begun_as_begin_layer_does():
    layer, keys = DynamicLayer(), torch.randn(2, 4, 3, 5)
    assert layer.is_initialized is False, cache_moved("begin_layer", "a new layer has begun")
    given = list(inspect.signature(layer.lazy_initialization).parameters)
    assert given == ["key_states", "value_states"], cache_moved(
        "begin_layer", f"lazy_initialization takes {given}"
    )
    layer.update(keys, 2 * keys)
    assert layer.is_initialized, cache_moved("begin_layer", "a layer in use has not begun")
    assert torch.equal(layer.keys, keys), cache_moved("begin_layer", "`keys` are no keys")
    assert torch.equal(layer.values, 2 * keys), cache_moved(
        "begin_layer", "`values` are no values"
    )


def test_the_layers_of_a_cache_can_be_exchanged_as_roomy_cache_does():
    config = small_llama(byte_tokenizer(), hidden_size=32).config
    layers = [type(layer) for layer in DynamicCache(config=config).layers]
    assert layers == [DynamicLayer] * 2, cache_moved("roomy_cache", f"its layers are {layers}")
    cache = generate.roomy_cache(config)
    keys = torch.randn(2, 4, 3, 8)
    cache.update(keys, keys, 1)
    assert cache.layers[1].buffers is not None, cache_moved(
        "roomy_cache", "a cache does not use the layers that it was given"
    )
    cache.reorder_cache(torch.tensor([1]))
    assert cache.layers[1].buffers is None, cache_moved(
        "RoomyLayer.reorder_cache", "a cache reorders its layers in another way"
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "jamba", "nemotron_h", "falcon_h1"])
def test_a_cache_keeps_its_tensors_where_held_looks(family):
    "Whatever has a row for each row of the batch is found, in layers of every kind."
    model = tiny_model("causal", family)
    cache = generate.roomy_cache(model.config)
    with torch.no_grad():
        model(torch.arange(5, 20).view(3, 5), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        found = [where[key] for where, key in generate.held(layer)]
        known = {id(tensor) for tensor in found}
        loose = []
        for value in vars(layer).values():
            inside = value.values() if isinstance(value, dict) else [value]
            loose += [x for x in inside if isinstance(x, torch.Tensor) and x.ndim > 1]
        unknown = [x for x in loose if id(x) not in known]
        assert not unknown, cache_moved("held", f"{type(layer).__name__} keeps more")
        larger = generate.with_rows(layer, 7)
        sizes = [len(where[key]) for where, key in generate.held(larger)]
        assert sizes == [7] * len(found), cache_moved("with_rows", "a layer is not copied")
        assert all(len(x) == 3 for x in found), cache_moved("with_rows", "a dict is shared")


def test_generation_s_own_steps_hand_a_state_on():
    "What OwnCache leans on: names of parameters, and that a state comes back."
    model = small_llama(byte_tokenizer(), hidden_size=32).eval()
    given = inspect.signature(model.prepare_inputs_for_generation).parameters
    assert {"next_sequence_length", "is_first_iteration"} <= set(given), cache_moved(
        "OwnCache", f"prepare_inputs_for_generation takes {list(given)}"
    )
    with torch.no_grad():
        own = generate.OwnCache(model, torch.tensor([[5, 6, 7]]))
        assert "past_key_values" in own.state, cache_moved("OwnCache", "no cache is handed on")
        said = own.feed(torch.tensor([[8]]))
        whole = model(torch.tensor([[5, 6, 7, 8]])).logits[:, -1]
    torch.testing.assert_close(said, whole, rtol=1e-4, atol=1e-4)


def test_rope_that_stretches_is_known_by_its_parts():
    "What fresh_positions puts back."
    scaled = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    model = small_llama(byte_tokenizer(), max_length=16, rope_parameters=scaled).eval()
    row = torch.arange(5, 13)[None]
    with torch.no_grad():
        fresh = model(row).logits
        model(torch.arange(40)[None])
        model.base_model.rotary_emb.original_max_seq_len = 4  # so that it is not put back
        assert not torch.equal(model(row).logits, fresh), cache_moved(
            "fresh_positions", "rope forgets by itself"
        )
        attention.fresh_positions(model)
        model.base_model.rotary_emb.max_seq_len_cached = 16
        assert torch.equal(model(row).logits, fresh), cache_moved(
            "fresh_positions", "rope keeps its state elsewhere"
        )


def test_a_forward_pass_has_the_names_that_decoder_gives():
    names = generate.forward_parameters(small_llama(byte_tokenizer(), hidden_size=32))
    used = {"logits_to_keep", "position_ids", "attention_mask", "past_key_values", "use_cache"}
    assert used <= names, cache_moved("Decoder", f"forward takes no {used - names}")


# ---- accelerate, for halos_nb.settings and halos_nb.preload


def test_accelerate_configurations_have_the_keys_we_know():
    from dataclasses import fields

    import yaml
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    from halos_nb.settings import FSDP_KEYS, NOT_HERE, ONLY, READ, SHIPPED

    new = {f.name for f in fields(ClusterConfig)} - {*ONLY, *READ, *NOT_HERE}
    assert not new, f"is it honoured? see halos_nb.settings: {new}"
    options = {action.dest for action in launch_command_parser()._actions}
    for file in SHIPPED.glob("*.yaml"):
        used = yaml.safe_load(file.read_text()).get("fsdp_config", {}).keys()
        assert used <= options & {*FSDP_KEYS}, f"{file}: {used - options}"


def test_accelerate_s_words_stand_where_they_are_read():
    "Without importing it; see accelerate_words and TRUTHS of halos_nb.settings."
    from accelerate.utils import PrecisionType, constants
    from accelerate.utils.environment import str_to_bool

    from halos_nb.settings import FSDP_WORDS, TRUTHS, accelerate_words

    for name in FSDP_WORDS.values():
        assert list(accelerate_words(name)) == getattr(constants, name)
    assert list(accelerate_words("PrecisionType")) == PrecisionType.list()
    assert {str_to_bool(word) for word in TRUTHS} == {0, 1}


def test_what_accelerate_launch_sets_can_be_asked_for():
    "Its parser, its reading of a file, and what it makes of both; see accelerate_variables."
    from halos_nb.jobs import accelerate_options
    from halos_nb.preload import accelerate_variables
    from halos_nb.settings import Profile

    options = accelerate_options(Profile(accelerate_config="fsdp2_cpu2"))
    found = accelerate_variables(options)
    assert found["ACCELERATE_USE_FSDP"] == "true" and found["FSDP_VERSION"] == "2"
    assert found["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"


# ---- torch's store and groups, for halos_nb.processes


def test_torch_meets_at_the_socket_that_it_is_given(tmp_path):
    "The store that was made first is the one that it asks for later: processes.meet_here."
    import socket
    from datetime import timedelta

    from ranks import run_ranks

    from halos_nb.processes import MEETING_SOCKET, collectives_begun, meet_here

    made = socket.create_server(("127.0.0.1", 0))

    def meet():
        import torch.distributed as dist

        os.environ["MASTER_PORT"] = str(made.getsockname()[1])
        if os.environ["RANK"] == "0":
            os.environ[MEETING_SOCKET] = str(made.detach())
        meet_here(timedelta(seconds=60))
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        before = collectives_begun()
        dist.barrier()
        assert collectives_begun() == before + 1, "torch counts collectives in another way"

    run_ranks(2, meet, tmp_path, env={"GLOO_SOCKET_IFNAME": "lo"})
    made.close()


# ---- papermill's command line, for halos_nb.submit


def test_papermill_reads_values_as_it_did():
    "`-p NAME VALUE` is checked as papermill will read it: submit.papermill_value."
    from papermill.cli import _resolve_type

    given = ["True", "None", "7", "1e-4", "true", "a b"]
    read = [True, None, 7, 1e-4, "true", "a b"]
    why = "papermill reads -p in another way; see halos_nb.submit.papermill_value"
    assert [_resolve_type(text) for text in given] == read, why
