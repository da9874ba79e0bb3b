"""Everything of verl, vLLM and TransferQueue that klreg_verl/verl_hooks touches, in one table, and how it must behave.

When a new version moves something, the failing test names what is gone, which module of ours relies on it, and why.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from verl_stack import FILES, FORWARD, REVERSE, compose, import_verl, need_stack, spec

from klreg_verl.core import logprobs
from klreg_verl.experiment.settings import KLSpec, LoggingSpec, TaskSpec, TrainSpec
from klreg_verl.verl_hooks import checkpoints, names, overrides
from launch import host

HOOKS = Path(overrides.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def verl() -> Any:
    need_stack()
    import_verl()
    return importlib.import_module("verl")


@dataclass(frozen=True, kw_only=True)
class Touch:
    """One thing that is not ours."""

    what: str
    """module:attribute.path"""
    by: str
    """The module of verl_hooks that relies on it."""
    why: str
    takes: tuple[str, ...] = ()
    """Parameters that we pass by name, or replace."""


BASE, SYNC = "verl.trainer.ppo.v1.trainer_base", "verl.trainer.ppo.v1.trainer_sync"
AGENT, VLLM_ROLLOUT = "verl.experimental.agent_loop", "verl.workers.rollout.vllm_rollout"
SERVER = "verl.workers.rollout.llm_server:LLMServerClient"
FUNCTIONAL = "verl.utils.torch_functional"
WORKERS, FSDP = "verl.workers.engine_workers", "verl.workers.engine.fsdp"
MICRO_BATCH = ("model_output", "data", "dp_group")
STEP = ("batch", "metrics")


def touches(by: str, *rows: tuple[Any, ...]) -> list[Touch]:
    return [Touch(by=by, what=row[0], why=row[1], takes=tuple(row[2:])) for row in rows]


TOUCHES = [
    *touches(
        "trainer.py",
        (f"{SYNC}:PPOTrainerSync", "is subclassed by KLRegTrainer"),
        (f"{SYNC}:PPOTrainerSync.__init__", "builds the trainer after prepare()", "config"),
        (f"{SYNC}:PPOTrainerSync.on_init_end", "is where the workers get our loss", "self"),
        (f"{SYNC}:PPOTrainerSync._balance_batch", "is where rows are ordered by (prompt, sample)", *STEP),
        (f"{SYNC}:PPOTrainerSync._compute_advantage", "is where KL is charged in the reward", *STEP),
        (f"{SYNC}:PPOTrainerSync._compute_metrics", "is where a batch is measured", *STEP, "timing_raw"),
        (f"{SYNC}:PPOTrainerSync._save_checkpoint", "tells the recorder of a checkpoint", "self"),
        (f"{SYNC}:PPOTrainerSync.on_step_end", "is where a run that was asked to stop saves", "self"),
        (f"{SYNC}:PPOTrainerSync._load_checkpoint", "tells the recorder where a run resumes", "self"),
        (f"{SYNC}:PPOTrainerSync._build_replay_buffer", "builds the object whose poll_interval is set", "self"),
        ("verl.trainer.ppo.v1.replay_buffer:ReplayBuffer.__init__", "polls every poll_interval s", "poll_interval"),
        ("verl.utils.config:omega_conf_to_dataclass", "makes the loss's ActorConfig", "config"),
        ("verl.utils.tracking:Tracking.log", "writes the step's line to every tracker", "data", "step"),
        ("verl.workers.engine_workers:ActorRolloutRefWorker.set_loss_fn", "takes our loss", "loss_fn"),
        ("transfer_queue:kv_batch_get", "reads a batch", "keys", "partition_id", "select_fields"),
        ("transfer_queue:kv_batch_put", "writes advantages back", "keys", "partition_id", "fields"),
        ("transfer_queue:KVBatchMeta.reorder", "orders the rows", "indexes"),
    ),
    *touches(
        "rows.py",
        ("transfer_queue:KVBatchMeta", "names a batch", "keys", "tags", "partition_id"),
        ("transfer_queue:kv_batch_get", "reads the batch to measure", "keys", "partition_id", "select_fields"),
    ),
    *touches(
        "temperature_one.py",
        (f"{SYNC}:PPOTrainerSync._compute_ref_log_prob", "is where both models are asked once more", *STEP),
        ("verl.workers.engine_workers:ActorRolloutRefWorker.compute_log_prob", "leaves log-probs in the queue", "data"),
        ("verl.workers.engine_workers:ActorRolloutRefWorker.compute_ref_log_prob", "the same of the reference", "data"),
        ("verl.workers.utils.padding:response_from_nested", "cuts responses from them", "tensor", "response_mask"),
        ("transfer_queue:KVBatchMeta", "carries the temperature", "extra_info"),
        ("transfer_queue:kv_batch_get", "reads them", "keys", "partition_id", "select_fields"),
    ),
    *touches(
        "loss.py",
        ("verl.workers.utils.losses:ppo_loss", "is the policy loss", "config", *MICRO_BATCH),
        (
            "verl.trainer.ppo.core_algos:agg_loss",
            "aggregates the KL term as the policy loss",
            *("loss_mat", "loss_mask", "loss_agg_mode"),
            *("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor"),
        ),
        ("verl.workers.utils.padding:no_padding_2_padding", "cuts responses from packed log-probs", "tensor", "data"),
        ("verl.utils.metric:Metric", "carries the KL term's value to the driver", "value", "aggregation"),
        ("verl.utils.metric:AggregationType.SUM", "sums the term over micro-batches"),
        ("verl.workers.config:ActorConfig.loss_agg_mode", "is the KL term's default aggregation"),
    ),
    *touches(
        "plugin.py",
        ("verl.trainer.constants_ppo:get_ppo_ray_runtime_env", "carries our variables to Ray's workers", "config"),
        (f"{BASE}:TRAINER_REGISTRY", "holds the trainer under the name sync"),
        (f"{BASE}:PPOTrainer", "is the base of every newer trainer, which only ours may have"),
        ("verl.trainer.ppo.ray_trainer:RayPPOTrainer", "is the base of every older trainer, which are refused"),
        ("verl.trainer.main_ppo:run_ppo", "is handed the runner of a main", "config", "task_runner_class"),
        ("verl.trainer.main_ppo:TaskRunnerV1", "is the only runner that starts our trainer"),
        ("verl.trainer.ppo.v1:get_trainer_cls", "tells which trainer would start", "name"),
        ("verl.trainer.ppo.core_algos:register_adv_est", "registers our advantages", "name_or_enum"),
        (f"{VLLM_ROLLOUT}.bucketed_weight_transfer:BucketedWeightSender.__init__", "opens a socket", "zmq_handle"),
        (f"{VLLM_ROLLOUT}.bucketed_weight_transfer:BucketedWeightReceiver.__init__", "opens a socket", "zmq_handle"),
        (f"{FUNCTIONAL}:logprobs_from_logits_v2", "is replaced where flash-attn's is missing", "logits", "labels"),
        (
            "verl.trainer.ppo.metric_utils:bootstrap_metric",
            "is replaced by one that is faster and reseeds nothing",
            *("data", "subset_size", "reduce_fns", "n_bootstrap", "seed"),
        ),
    ),
    *touches(
        "main.py",
        ("verl.trainer.main_ppo:main", "is verl's command"),
        ("verl.plugin.platform:get_platform", "names the device in the log"),
    ),
    *touches("overrides.py", ("vllm.v1.executor.uniproc_executor:UniProcExecutor", "is vLLM's only process on a CPU")),
    *touches(
        "sampling.py",
        ("verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ.generate_sequences", "dispatches prompts", "prompts"),
        ("verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ.create", "builds the manager by its class name"),
        (f"{AGENT}.single_turn_agent_loop:SingleTurnAgentLoop.run", "samples one response", "sampling_params"),
        (
            "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.__ray_metadata__.modified_class._run_agent_loop",
            "makes the loop of one sample and runs it; ours keeps the loop",
            *("sampling_params", "trajectory", "agent_name", "trace"),
        ),
        (f"{AGENT}.agent_loop:AgentLoopBase.__init__", "gives the loop data.seed", "data_config"),
        (f"{SERVER}._acquire_server", "asks the balancer for a server, which one server needs once", "request_id"),
        (f"{SERVER}._release_server", "tells the balancer, for which one server has no use", "server_id", "request_id"),
        (f"{AGENT}.agent_loop:AgentLoopOutput", "is what a loop returns"),
        ("vllm.sampling_params:RequestOutputKind.FINAL_ONLY", "saves a message per token"),
        ("vllm.sampling_params:SamplingParams", "takes a seed per request", "seed", "output_kind"),
    ),
    *touches(
        "cpu.py",
        ("verl.plugin.platform.platform_base:PlatformBase", "is subclassed by the CPU platform"),
        ("verl.plugin.platform.platform_manager:PlatformRegistry.register", "takes the platform", "platform"),
        (
            "verl.utils.distributed:initialize_global_process_group_ray",
            "names the backend, which must be cpu:gloo alone",
            *("timeout_second", "backend"),
        ),
        ("verl.workers.engine.fsdp.transformer_impl:CPUOffloadPolicy", "is replaced by one that does not pin"),
        (
            f"{VLLM_ROLLOUT}.utils:vLLMColocateWorkerExtension._update_weights",
            "gets copies of the received weights",
            "weights",
        ),
        (
            "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
            "is replaced, since it drops the weights that an update must write",
            *("layer", "remove_weight"),
        ),
    ),
    *touches(
        "progress.py",
        ("verl.workers.rollout.llm_server:LLMServerClient.generate", "is counted: a response", "prompt_ids"),
        (f"{AGENT}.agent_loop:AgentLoopWorker._compute_score", "is counted: a reward", "outputs"),
        ("verl.workers.engine.fsdp.transformer_impl:FSDPEngine.forward_step", "is counted: a batch", "micro_batch"),
        (f"{BASE}:PPOTrainer.on_sample_end", "ends the phase of sampling", "self"),
        (f"{BASE}:PPOTrainer.on_validate_begin", "begins another", "self"),
        (f"{BASE}:PPOTrainer._compute_reward_colocate", "asks a reward model", "batch"),
    ),
    *touches(
        "transfer.py",
        (f"{VLLM_ROLLOUT}.vllm_rollout:ServerAdapter._execute_method", "makes vLLM receive", "method", "non_block"),
        (f"{VLLM_ROLLOUT}.vllm_rollout:BucketedWeightSender._init_socket", "opens the socket", "self"),
        (f"{VLLM_ROLLOUT}.bucketed_weight_transfer:rebuild_shared_memory", "is closed after a failure, too", "name"),
        ("verl.workers.config:CheckpointEngineConfig.update_weights_bucket_megabytes", "is the size of a bucket"),
        ("verl.workers.engine.fsdp.transformer_impl:FSDPEngine.get_per_tensor_param", "yields what is sent", "self"),
        ("verl.utils.model:convert_weight_keys", "names what is sent", "state_dict", "model"),
    ),
    *touches(
        "worker.py",
        (f"{BASE}:PPOTrainer._init_resource_pool_mgr", "names the worker class, which install() replaces", "self"),
        (f"{WORKERS}:ActorRolloutRefWorker.init_model", "builds actor and reference", "self"),
        (f"{WORKERS}:ActorRolloutRefWorker.set_loss_fn", "hands the loss to the actor", "loss_fn"),
        (f"{WORKERS}:ActorRolloutRefWorker.actor_worker_cls", "is replaced by one that asks for the logits"),
        (f"{WORKERS}:ActorRolloutRefWorker.ref_worker_cls", "is replaced by one with a model of its own"),
        (f"{WORKERS}:TrainingWorker.__init__", "builds the reference's engine", "config"),
        (f"{WORKERS}:TrainingWorker.train_batch", "is told to give the logits to the loss", "data"),
        ("verl.workers.config:TrainingWorkerConfig", "gets the reference's own model", "model_config"),
        (
            "verl.workers.config:HFModelConfig",
            "loads the reference's own checkpoint",
            *("path", "hf_config_path", "tokenizer_path", "lora_rank", "lora_adapter_path", "lora"),
        ),
        ("verl.utils.config:omega_conf_to_dataclass", "makes the policy's model settings", "config"),
        ("verl.utils.tensordict_utils:assign_non_tensor", "sets a flag of a batch", "tensor_dict"),
        ("verl.single_controller.base.decorator:Dispatch.ONE_TO_ALL", "calls every worker"),
        ("verl.single_controller.base.decorator:register", "lets the driver call a method", "dispatch_mode"),
    ),
    *touches(
        "exact.py",
        (f"{FSDP}:FSDPEngine", "is the only engine whose logits we know how to get"),
        (f"{FSDP}:FSDPEngine.eval_mode", "prepares the reference for a forward pass"),
        (
            f"{FSDP}:FSDPEngineWithLMHead.forward_step",
            "gives the reference's logits",
            *("micro_batch", "loss_function", "forward_only"),
        ),
        (
            f"{FSDP}:FSDPEngineWithLMHead.prepare_model_outputs",
            "calls the loss with student_logits first",
            "logits_processor_func",
        ),
        ("verl.utils.tensordict_utils:assign_non_tensor", "sets the flags of a batch", "tensor_dict"),
    ),
    *touches(
        "trainer.py",
        (f"{SYNC}:PPOTrainerSync.on_train_begin", "is where the reference's responses are drawn", "self"),
        (f"{SYNC}:PPOTrainerSync._update_actor", "is where the workers are told which of them come next", *STEP),
    ),
    *touches(
        "reference_samples.py",
        ("verl.utils.dataset.rl_dataset:collate_fn", "makes a batch of prompts", "data_list"),
        ("verl.utils.tensordict_utils:get_tensordict", "makes the request", "tensor_dict"),
        ("verl.utils.tensordict_utils:assign_non_tensor_data", "adds the number of responses", "key", "val"),
        ("transfer_queue:kv_list", "says when all responses are there", "partition_id"),
        ("transfer_queue:kv_batch_put", "registers the prompts", "keys", "partition_id", "tags"),
        ("transfer_queue:kv_batch_get", "reads the responses", "keys", "partition_id", "select_fields"),
        ("transfer_queue:kv_clear", "takes them out of the queue", "keys", "partition_id"),
        ("verl.checkpoint_engine:CheckpointEngineManager.sleep_replicas", "makes vLLM forget the prompts"),
        ("verl.checkpoint_engine:CheckpointEngineManager.update_weights", "wakes vLLM again", "global_steps"),
    ),
    *touches(
        "reference_loss.py",
        (f"{FSDP}:FSDPEngine", "adds the gradients of a second pass to those of the first"),
        (
            f"{FSDP}:FSDPEngine.forward_backward_batch",
            "is gone through once more",
            *("data", "loss_function", "forward_only"),
        ),
        (f"{FSDP}:FSDPEngine.get_data_parallel_rank", "says which of the rows are a worker's"),
        (f"{FSDP}:FSDPEngine.get_data_parallel_size", "says how many workers share the rows"),
        ("verl.workers.utils.padding:no_padding_2_padding", "cuts responses from packed log-probs", "tensor", "data"),
        ("verl.utils.metric:Metric", "carries the loss's value to the driver", "value", "aggregation"),
        ("verl.utils.metric:AggregationType.SUM", "sums it over micro-batches"),
        ("verl.utils.tensordict_utils:get_tensordict", "makes a batch of stored rows", "tensor_dict"),
    ),
]


def resolve(path: str) -> Any:
    module, _, attributes = path.partition(":")
    found = importlib.import_module(module)
    for name in attributes.split("."):
        found = inspect.getattr_static(found, name) if name.startswith("__") else getattr(found, name)
    return found


def broken(touch: Touch, what: str) -> str:
    version = importlib.import_module("verl").__version__
    return f"verl_hooks/{touch.by} relies on {touch.what}, which {touch.why}; with verl {version} {what}."


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: f"{touch.by}-{touch.what}")
def test_what_the_hooks_touch_exists_and_takes_what_they_pass(touch: Touch):
    try:
        found = resolve(touch.what)
    except (ImportError, AttributeError) as error:
        pytest.fail(broken(touch, f"it is gone: {error}"))
    if touch.takes:
        parameters = inspect.signature(found).parameters
        missing = [name for name in touch.takes if name not in parameters]
        assert not missing, broken(touch, f"it does not take {missing} any more: it takes {list(parameters)}")


OWN_PACKAGES = {"verl", "vllm", "transfer_queue"}


def imported_names() -> Iterator[tuple[str, str]]:
    """(file, module:name) of every import from verl and its stack in the hooks, lazy ones included."""
    for path in sorted(HOOKS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OWN_PACKAGES:
                yield from ((path.name, f"{node.module}:{alias.name}") for alias in node.names)


def waited_modules() -> set[str]:
    """Modules that the plugin waits for by name."""
    text = "".join(path.read_text() for path in HOOKS.glob("*.py"))
    return set(re.findall(r'after_import\("([\w.]+)"', text))


def test_the_table_names_every_import_of_the_hooks():
    def listed(file: str, name: str) -> bool:
        short = name.partition(":")[2]
        return any(touch.by == file and re.search(rf"[:.]{short}(\.|$)", touch.what) for touch in TOUCHES)

    missing = [f"{file}: {name}" for file, name in imported_names() if not listed(file, name)]
    assert missing == ["main.py: verl.trainer:main_ppo"]  # in the table as verl.trainer.main_ppo:main
    assert waited_modules() <= {touch.what.partition(":")[0] for touch in TOUCHES} | {SYNC}


def test_the_installed_verl_is_the_tested_one(verl: Any):
    assert verl.__version__ == names.TESTED["verl"], (
        "names.TESTED says which verl the hooks ran with. Run this file and tests/e2e with the new one, then raise it."
    )


# ------------------------------------------------------------------------------------------------ behaviour: trainer


def source(path: str) -> str:
    found = resolve(path)
    return inspect.getsource(getattr(found, "__ray_actor_class__", found))


def in_order(text: str, *parts: str) -> None:
    """Every part is in the text, each after the one before."""
    places = []
    for part in parts:
        assert part in text, f"{part!r} is gone"
        places.append(text.index(part))
    assert places == sorted(places), f"the order is not {parts} any more"


def test_a_dictionary_decides_which_trainer_starts_and_only_sync_is_synchronous(monkeypatch: pytest.MonkeyPatch):
    base = importlib.import_module(BASE)
    assert base.get_trainer_cls("sync") is resolve(f"{SYNC}:PPOTrainerSync")
    monkeypatch.setitem(base.TRAINER_REGISTRY, "sync", int)
    assert base.get_trainer_cls("sync") is int, "plugin.py swaps the class in TRAINER_REGISTRY"
    assert 'self.trainer_mode == "sync"' in source(f"{BASE}:PPOTrainer._build_replay_buffer"), (
        'plugin.py keeps the name "sync" because other names select asynchronous code'
    )


def test_our_loss_is_sent_after_the_workers_exist():
    in_order(source(f"{BASE}:PPOTrainer.init"), "self._setup()", "self.on_init_end()")
    assert "self.actor_rollout_wg" in source(f"{BASE}:PPOTrainer._setup")


def test_a_step_goes_in_the_order_that_the_trainer_counts_on():
    in_order(
        source(f"{BASE}:PPOTrainer._step_once"),
        *("self._balance_batch(", "self._compute_old_log_prob(", "self._compute_ref_log_prob("),
        *("self._compute_advantage(", "self._update_actor("),
    )
    fit = source(f"{BASE}:PPOTrainer.fit")
    in_order(fit, "self.logger = Tracking(", "while current_epoch")
    loop = fit[fit.index("while current_epoch") :]
    in_order(
        loop,
        *("self.step(metrics, self.timing_raw)", "self._save_checkpoint()", "self._compute_metrics("),
        *("tq.kv_clear(", "self.logger.log(data=metrics, step=self.global_steps)"),
    )


def test_the_names_of_the_timed_phases_are_those_that_are_translated():
    text = inspect.getsource(importlib.import_module(BASE)) + inspect.getsource(importlib.import_module(SYNC))
    assert [name for name in names.TIMINGS if f'marked_timer("{name}"' not in text] == []


def test_a_trainer_that_loads_nothing_is_at_step_zero():
    trainer = SimpleNamespace(config=OmegaConf.create({"trainer": {"resume_mode": "disable"}}))
    resolve(f"{BASE}:PPOTrainer._load_checkpoint")(trainer)
    assert trainer.global_steps == 0


def test_verl_finds_the_checkpoint_that_checkpoints_py_points_to(tmp_path: Path):
    find = resolve("verl.utils.checkpoint.checkpoint_manager:find_latest_ckpt_path")
    folder = checkpoints.step_folder(tmp_path, 20)
    folder.mkdir()
    (folder / "data.pt").write_bytes(b"1")
    checkpoints.mark_complete(folder)
    assert find(str(tmp_path)) is None  # no tracker yet
    checkpoints.repair(tmp_path)
    assert find(str(tmp_path)) == str(folder)


def test_verl_writes_a_checkpoint_where_checkpoints_py_looks_for_it():
    text = source(f"{BASE}:PPOTrainer._save_checkpoint")
    assert f"{checkpoints.PREFIX}{{self.global_steps}}" in text
    in_order(text, "data.pt", checkpoints.TRACKER, "on_save(")


def test_a_reference_with_coefficient_zero_is_loaded():
    need = resolve("verl.trainer.ppo.utils:need_reference_policy")
    config = OmegaConf.create(
        {
            "algorithm": {"use_kl_in_reward": False},
            "actor_rollout_ref": {"actor": {"use_kl_loss": True, "kl_loss_coef": 0.0}},
        }
    )
    assert need(config), "trainer.prepare loads the reference by use_kl_loss with coefficient 0"


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_a_node_has_the_slots_that_verls_actors_wait_for(workers: int):
    pool = importlib.import_module("verl.single_controller.ray.base").ResourcePoolManager
    units = compose().transfer_queue.backend.SimpleStorage.num_data_storage_units
    assert (pool.max_colocate_count, units) == (3, 8)
    assert host.ray_slots(workers) > pool.max_colocate_count * workers + units + 1  # with the controller, and one free


def test_log_probabilities_in_blocks_are_verls():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 300, generator=generator).requires_grad_()
    tokens, upstream = torch.randint(0, 300, (40,), generator=generator), torch.randn(40, generator=generator)
    verls = resolve(f"{FUNCTIONAL}:logprobs_from_logits_v2")
    assert verls is not logprobs.in_blocks and "logprobs_from_logits_v2(logits, labels)" in source(
        f"{FUNCTIONAL}:logprobs_from_logits"
    )
    ours, theirs = (function(logits, tokens) for function in (logprobs.in_blocks, verls))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    gradients = [torch.autograd.grad(values, logits, upstream)[0] for values in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_the_replay_buffer_sleeps_for_poll_interval():
    assert "time.sleep(self.poll_interval)" in source(
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._wait_for_next_poll"
    )


def test_one_more_destination_in_tracking_gets_each_line_and_is_ignored_at_the_end():
    tracking = resolve("verl.utils.tracking:Tracking")(project_name="p", experiment_name="e", default_backend=[])
    lines = []
    tracking.logger["klreg"] = SimpleNamespace(log=lambda data, step: lines.append((data, step)))
    tracking.log(data={"a": 1.0}, step=3)
    tracking.finish()
    assert lines == [({"a": 1.0}, 3)]
    assert 'getattr(self.trainer, "logger", None)' in source("verl.trainer.main_ppo:TaskRunnerV1")


def test_validation_hands_over_what_our_summary_takes():
    parameters = list(inspect.signature(resolve(f"{BASE}:PPOTrainer._val_metrics_update")).parameters)
    names = ["self", "data_sources", "sample_uids", "reward_extra_infos_dict", "sample_turns", "expected_acc_counts"]
    assert parameters == names
    assert "process_validation_metrics(" in source(f"{BASE}:PPOTrainer._val_metrics_update")
    assert "bootstrap_metric(" in source("verl.trainer.ppo.metric_utils:process_validation_metrics")
    assert "expected_acc_counts=expected_acc_counts" in source(f"{BASE}:PPOTrainer._validate")


def test_the_workers_kl_term_arrives_summed_over_micro_batches_and_averaged_over_workers():
    metric, total = resolve("verl.utils.metric:Metric"), resolve("verl.utils.metric:AggregationType.SUM")
    workers = [metric(value=first, aggregation=total) for first in (1.0, 3.0)]
    for worker, second in zip(workers, (2.0, 4.0), strict=True):
        worker.append(second)
    # loss.py: a value carries the factor dp_size, so the mean over workers is the mini-batch's: (1+3)/2 + (2+4)/2
    assert metric.aggregate_dp(workers) == 5.0
    update = source(f"{BASE}:PPOTrainer._update_actor")
    in_order(update, 'rename_dict(output["metrics"], "actor/")', "reduce_metrics(")
    assert resolve("verl.utils.metric:reduce_metrics")({"kl_loss": [1.0, 2.0]}) == {"kl_loss": 1.5}


# -------------------------------------------------------------------------------------------- behaviour: rows, sampling


def test_the_fields_of_a_response_are_those_that_rows_py_reads():
    output = resolve(f"{AGENT}.agent_loop:AgentLoopOutput")(
        prompt_ids=[1, 2],
        response_ids=[3, 4, 5],
        response_mask=[1, 1, 0],
        response_logprobs=[-1.0, -2.0, 0.0],
        reward_score=0.5,
        num_turns=2,
        metrics={},
        extra_fields={"reward_extra_info": {"acc": 1.0}},
    ).as_dict()
    assert output[names.PROMPTS].tolist() == [1, 2]
    assert output[names.RESPONSES].tolist() == [3, 4, 5]
    assert output[names.RESPONSE_MASK].tolist() == [1, 1, 0]
    assert output[names.ROLLOUT_LOGPROBS].tolist() == [-1.0, -2.0, 0.0]
    assert output[names.TOKEN_REWARDS].tolist() == [0.0, 0.0, 0.5], "Rows.scores sums unmasked: the last token has it"
    assert output[names.EXTRA_FIELDS] == {names.REWARD_EXTRAS: {"acc": 1.0}}


@pytest.mark.parametrize(
    ("method", "stored"),
    [
        ("_compute_old_log_prob", (names.OLD_LOGPROBS, names.ENTROPY, names.LOGPROBS)),
        ("_compute_ref_log_prob", (names.REF_LOGPROBS, names.LOGPROBS)),
        ("_compute_advantage", (names.ADVANTAGES, names.RETURNS, names.GROUP, names.TOKEN_REWARDS)),
    ],
)
def test_the_fields_that_the_trainer_stores_have_the_names_in_names_py(method: str, stored: tuple[str, ...]):
    text = source(f"{BASE}:PPOTrainer.{method}")
    assert [name for name in stored if f'"{name}"' not in text] == []


def test_a_row_has_a_key_of_uid_sample_and_output_and_the_columns_of_its_prompt():
    text = source("verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ")
    in_order(text, "session_id=i, **prompt", 'keys.append(f"{uid}_{session_id}_{i}")')
    assert "field.update(kwargs)" in text  # data_source, extra_info, uid and our label travel with the row


def test_verls_padding_rows_are_tagged_and_fully_masked():
    template = resolve("verl.trainer.ppo.padding_utils:construct_minimal_padding_template")
    sample, tag = template({"position_ids": torch.arange(3)}, {"status": "success"}, 0)
    assert tag["is_padding"] is True
    assert sample[names.RESPONSE_MASK].tolist() == [0]
    assert sample[names.TOKEN_REWARDS].tolist() == [0.0]


def test_verl_loads_our_manager_and_our_loop_by_name():
    from hydra.utils import get_method

    from klreg_verl.verl_hooks import sampling

    load = resolve("verl.utils.import_utils:load_class_from_fqn")
    assert load(names.MANAGER, "AgentLoopManager") is sampling.SeededAgentLoopManager
    (entry,) = OmegaConf.load(resolve("verl.utils.import_utils:resolve_config_path")(str(names.AGENT_CONFIG)))
    assert entry.name == names.AGENT_NAME
    assert get_method(entry["_target_"]) is sampling.single_turn
    assert '"agent_name" not in batch' in source("verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ")


def test_verl_takes_sampling_settings_to_vllm_as_they_are():
    text = inspect.getsource(importlib.import_module(f"{VLLM_ROLLOUT}.vllm_async_server"))
    assert "SamplingParams(max_tokens=max_tokens, **sampling_params)" in text, "sampling.py sends seed and output_kind"


def test_verl_loads_a_reward_function_by_package():
    load = resolve("verl.utils.import_utils:load_extern_object")
    from data_prep.rewards import compute_score

    assert load(overrides.REWARD_MODULE, "compute_score") is compute_score


# --------------------------------------------------------------------------------------------- behaviour: plugin, cpu


def test_the_runtime_environment_is_a_dictionary_of_variables():
    environment = resolve("verl.trainer.constants_ppo:get_ppo_ray_runtime_env")(None)
    assert isinstance(environment["env_vars"], dict)


def test_weights_travel_over_sockets_in_tmp():
    text = inspect.getsource(importlib.import_module(f"{VLLM_ROLLOUT}.vllm_rollout"))
    assert 'f"ipc:///tmp/rl-colocate-zmq-{job_id}' in text, "plugin.py moves them into the session's folder"
    text = inspect.getsource(importlib.import_module(f"{VLLM_ROLLOUT}.utils"))
    assert 'f"ipc:///tmp/rl-colocate-zmq-{job_id}' in text


def test_verl_passes_an_estimator_what_ours_take():
    text = source("verl.trainer.ppo.ray_trainer:compute_advantage")
    for name in ("token_level_rewards", "response_mask", "index"):
        assert f'"{name}"' in text, f"advantages.py: an estimator is called with {name}"


def test_the_advantages_that_may_carry_kl_exist_in_verl():
    from klreg_verl.core import advantages
    from klreg_verl.verl_hooks.advantages import register

    algos = importlib.import_module("verl.trainer.ppo.core_algos")
    ours = {names.ADVANTAGE_PREFIX + name for name in advantages.names()}
    before = dict(algos.ADV_ESTIMATOR_REGISTRY)
    try:
        register(algos.register_adv_est)
        assert set(algos.ADV_ESTIMATOR_REGISTRY) >= names.REWARD_CARRIERS >= ours
    finally:
        algos.ADV_ESTIMATOR_REGISTRY.clear()
        algos.ADV_ESTIMATOR_REGISTRY.update(before)


cpu_only = pytest.mark.skipif(os.environ.get("VERL_PLATFORM") != "cpu", reason="the platform is verl's own CUDA")


@cpu_only
def test_the_cpu_platform_has_all_that_a_platform_must():
    platform = resolve("verl.plugin.platform:get_platform")()
    assert type(platform).__name__ == "PlatformCPU", "an abstract method of PlatformBase is missing in cpu.py"
    assert (platform.device_name, platform.communication_backend_name()) == ("cpu", "gloo")
    device = resolve("verl.utils.device:get_torch_device")()
    assert device.memory_reserved() > 0
    free, total = device.mem_get_info()
    assert 0 < free < total
    device.set_rng_state(device.get_rng_state())
    assert device.empty_cache() is None


@cpu_only
def test_the_cpu_patches_are_in_place_once_their_modules_are_imported():
    policy = resolve("verl.workers.engine.fsdp.transformer_impl:CPUOffloadPolicy")(pin_memory=True)
    assert policy.pin_memory is False
    utils = importlib.import_module("vllm.model_executor.layers.utils")
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight is weight
    torch.testing.assert_close(utils.cpu_unquantized_gemm(layer, torch.ones(1, 2), weight, None), weight.sum(1)[None])
    assert importlib.import_module("verl.third_party.vllm").package_version, "verl asks for the distribution vllm"


@cpu_only
def test_received_weights_are_copied_before_their_buffer_closes():
    from klreg_verl.verl_hooks import cpu

    worker = resolve(f"{VLLM_ROLLOUT}.utils:vLLMColocateWorkerExtension")
    assert worker._update_weights.__module__ == cpu.__name__, "cpu.py did not wrap vLLMColocateWorkerExtension"
    buffer, loaded = torch.ones(2), []

    class Worker:
        def _update_weights(self, weights: Any, peft_config: Any = None) -> None:
            loaded.extend(weights)

    cpu._copy_received_weights(SimpleNamespace(vLLMColocateWorkerExtension=Worker))
    Worker()._update_weights([("w", buffer)], peft_config=None)
    buffer.zero_()
    assert loaded[0][1].tolist() == [1.0, 1.0]


def test_the_engine_of_another_device_can_be_named():
    assert 'os.getenv("VERL_ENGINE_DEVICE")' in inspect.getsource(importlib.import_module("verl.workers.engine.base"))


def test_the_variables_of_a_cpu_run_are_read_by_somebody():
    envs = importlib.import_module("vllm.envs")
    from klreg_verl.verl_hooks import cpu

    assert [
        name for name in cpu.ENVIRONMENT if name.startswith("VLLM_") and name not in envs.environment_variables
    ] == []
    assert "TQ_NUM_THREADS" in inspect.getsource(importlib.import_module("transfer_queue.client"))
    assert "TENSORBOARD_DIR" in inspect.getsource(importlib.import_module("verl.utils.tracking"))


# -------------------------------------------------------------------------------------------------- behaviour: settings

SPECS: dict[str, Callable[[], Any]] = {
    "rloo": lambda: spec(kl=REVERSE),
    "grpo": lambda: spec(train=TrainSpec(advantage="grpo", micro_batch=4), kl=FORWARD),
    "dr_grpo": lambda: spec(train=TrainSpec(advantage="dr_grpo"), kl=KLSpec()),
    "own task": lambda: spec(
        task=TaskSpec(train="/t", val="/v", reward="mine:score"), logging=LoggingSpec(wandb="offline")
    ),
}
FREE = {"override_config", "vllm"}
"""Mappings of verl's settings that take any key (rollout.engine_kwargs.vllm: what vLLM's command line takes)."""


def is_known(key: str, defaults: Any) -> bool:
    """Whether verl's YAML has the key, or the dataclass that its mapping becomes, or the mapping takes any."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(defaults, parent)
    if parent.rpartition(".")[2] in FREE:
        return isinstance(node, dict | type(defaults))
    target = node.get("_target_") if node is not None else None
    return node is not None and (last in node.keys() or (target is not None and last in field_names(target)))


def field_names(target: str) -> set[str]:
    from hydra.utils import get_class

    return {field.name for field in fields(get_class(target))}


@pytest.fixture(scope="module")
def defaults() -> Any:
    return compose()


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("arm", SPECS)
def test_every_setting_is_one_of_verls(arm: str, platform: str, defaults: Any):
    unknown = [key for key in overrides.settings(SPECS[arm](), FILES, platform) if not is_known(key, defaults)]
    assert unknown == [], "overrides.py sets keys that verl does not read; ++ would add them and nobody would notice"


def test_a_key_that_verl_does_not_have_is_seen(defaults: Any):
    assert not is_known("trainer.save_frequency", defaults)
    assert not is_known("actor_rollout_ref.actor.kl_beta", defaults)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("arm", SPECS)
def test_verl_accepts_the_settings_and_turns_them_into_what_its_workers_get(arm: str, platform: str):
    run = SPECS[arm]()
    config = compose(overrides.settings(run, FILES, platform))
    resolve("verl.utils.config:validate_config")(config, use_reference_policy=True, use_critic=False)
    convert = resolve("verl.utils.config:omega_conf_to_dataclass")
    actor, rollout = convert(config.actor_rollout_ref.actor), convert(config.actor_rollout_ref.rollout)
    assert (actor.loss_agg_mode, actor.loss_scale_factor) == (run.train.policy_aggregation, run.train.loss_scale_factor)
    assert actor.global_batch_info == {}
    assert rollout.n == run.train.responses_per_prompt
    if platform == "cpu":
        assert actor.engine.mixed_precision["param_dtype"] == "fp32"
        assert (rollout.dtype, rollout.enable_sleep_mode, rollout.free_cache_engine) == ("float32", False, False)
    object.__setattr__(actor, "use_kl_loss", False)  # as the trainer does to the copy that the loss gets
    assert actor.use_kl_loss is False


def test_settings_of_the_reference_survive_verls_renaming():
    config = compose(overrides.settings(spec(), FILES, "cpu"))
    ref = config.actor_rollout_ref.ref
    text = source("verl.workers.engine_workers:ActorRolloutRefWorker.init_model")
    assert 'self.config.ref.pop(\n                    "log_prob_micro_batch_size_per_gpu", None' in text
    assert ref.log_prob_micro_batch_size_per_gpu == 128  # 16 prompts x 8 responses, one worker
    assert ref.fsdp_config.mixed_precision.param_dtype == "fp32"


# ------------------------------------------------------------------------------------ behaviour: reference_samples


def test_the_reference_is_sampled_after_validation_and_before_the_first_step():
    in_order(
        source(f"{BASE}:PPOTrainer.fit"),
        *("self._validate()", "self.global_steps += 1", "self.on_train_begin()", "while current_epoch"),
    )


def test_a_prompt_says_how_many_responses_it_wants_and_when_they_are_there():
    agent_loop = "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ"
    text = source(agent_loop)
    in_order(text, 'prompt.pop("__rollout_n__", config.n', "session_id=i", 'status = "failure"', 'status = "finished"')
    assert '"train" if not trajectory["validate"] else "val"' in text
    assert 'tags = [{"is_prompt": True, "status": "pending", "global_steps": self.global_steps}' in source(
        f"{BASE}:PPOTrainer._submit_batch_to_rollout"
    )


def test_gradients_are_made_between_zeroing_and_the_optimizers_step_by_a_method_of_the_engine():
    in_order(
        source("verl.workers.engine.base:BaseEngine.train_batch"),
        *("self.optimizer_zero_grad()", "self.forward_backward_batch(data, loss_function", "self.optimizer_step()"),
    )
    assert "train_batch" not in vars(resolve(f"{FSDP}:FSDPEngine"))
    assert "self.train_batch(mini_batch_td)" in source(f"{WORKERS}:TrainingWorker.train_mini_batch")


def test_vllm_forgets_its_prompts_with_new_weights():
    assert "clear_kv_cache" in source(f"{VLLM_ROLLOUT}.vllm_rollout:ServerAdapter.update_weights")
