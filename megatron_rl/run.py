"""One run: builds what the loops of train.py use, and does what surrounds a step (metrics, evaluation, checkpoints)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from megatron_rl.algorithms import build_algorithm
from megatron_rl.algorithms.base import OnlineAlgorithm
from megatron_rl.config import Config, save_resolved, shown
from megatron_rl.data.inputs import Inputs
from megatron_rl.doctor.memory_advice import check_gpu
from megatron_rl.errors import UserError
from megatron_rl.evaluation.distance import distance_metrics
from megatron_rl.evaluation.held_out import HeldOut
from megatron_rl.launch.finished import result_settings
from megatron_rl.launch.folder import BEST_EXPORT, STEP_EXPORTS, RunFolder
from megatron_rl.launch.rank import Runtime
from megatron_rl.metrics import MetricsLogger, PhaseTimer, build_sinks
from megatron_rl.metrics.best import BestSteps
from megatron_rl.metrics.profiler import StepProfiler
from megatron_rl.metrics.step import rollout_metrics, sample_metrics, update_metrics
from megatron_rl.metrics.timing import resident_bytes
from megatron_rl.model.build import build_groups_of
from megatron_rl.model.checkpoint import Checkpoints, fixed_settings
from megatron_rl.model.generators import seed_generators
from megatron_rl.model.numerics import NumericsMonitor
from megatron_rl.model.policy import Policy
from megatron_rl.model.trainable import Trainable
from megatron_rl.model.weights import export_hf, start_weights
from megatron_rl.parallel.agree import all_ranks_agree
from megatron_rl.process import activity
from megatron_rl.report.curves import plot_curves
from megatron_rl.report.rollout_texts import RolloutTexts
from megatron_rl.report.summary import sum_up
from megatron_rl.rollout.build import build_engine, build_scorer
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.types import RolloutGroup, TrainingSample
from megatron_rl.weight_sync.publish import WeightSync, served_model


class Run:
    """All parts of one run on this rank. Every rank builds the same parts; sharding happens inside them."""

    def __init__(self, config: Config, runtime: Runtime, *, is_trained: bool = True) -> None:
        """Build all parts.

        Args:
            config: of the run.
            runtime: of this rank.
            is_trained: False for a run that samples and evaluates only: its model has no optimizer and no gradients, it
                needs no reference, and it writes no checkpoint; the weights of one it does load.
        """
        self.config, self.runtime, self.is_trained = config, runtime, is_trained
        self.started = time.monotonic()
        self.directory = config.exp_manager.run_dir
        self.is_first = runtime.rank == 0
        self.timer = PhaseTimer(
            synchronize=torch.cuda.synchronize if runtime.device.type == "cuda" else None, on_border=activity.enter
        )
        self._rollout_metrics: dict[str, float] = {}
        self._exported_best: int | None = None
        self.num_generated_tokens = 0
        """Tokens sampled for training so far, including dropped rollouts; evaluation excluded."""
        seed_generators(config.trainer.seed)
        self.groups = build_groups_of(config, runtime.device)
        with all_ranks_agree(self.groups.cpu_group):
            self.folder, manager = RunFolder(self.directory, self.say, is_writer=self.is_first), config.exp_manager
            if self.is_first and is_trained and not manager.resume_if_exists and manager.resume_from_checkpoint is None:
                self.folder.check_unused()
        self.inputs = Inputs(config, self.groups, self.say)
        self.shape = self.inputs.shape
        with all_ranks_agree(self.groups.cpu_group):
            if is_trained:
                check_gpu(config, self.shape, self.groups, longest=self.inputs.longest_row)
        with all_ranks_agree(self.groups.cpu_group):  # a module from outside may fail on one machine alone
            self.algorithm = build_algorithm(config)
            if config.trainer.stage == "rl":
                self.online_algorithm.use_tokenizer(self.inputs.tokenizer)
        self._texts = RolloutTexts(config.exp_manager.rollout_texts, self.directory, self.inputs.tokenizer)
        self.inputs.open_pools(self.online_algorithm.pool_need if config.trainer.stage == "rl" else None)
        self.held_out = HeldOut(self.inputs.held_out, config, self.groups, self.say)
        with ExitStack() as parts:  # stops the parts that were started, also if a later one cannot be built
            self._build(parts)
            self._parts = parts.pop_all()

    def _build(self, parts: ExitStack) -> None:
        config = self.config
        # The engine comes first: servers on GPUs of their own take long to start, and do so while the policy is built. Those
        # on the trainer's start in the first ``publish``, when the policy is there and has released what only updates need.
        engine = self._build_engine() if config.needs_engine else None
        if engine is not None:
            parts.callback(engine.close)
        self.policy = Policy(self._build_model())
        needs_reference = self.is_trained and "ref_log_probs" in self.algorithm.needs
        self.reference = self.policy.trainable.snapshot() if needs_reference else []
        numerics = config.trainer.numerics
        self._numerics: NumericsMonitor | None = None
        if numerics.every_n_steps:
            self._numerics = NumericsMonitor(self.policy.chunks, numerics, config.policy.megatron_cfg, self.groups)
        self.checkpoints = Checkpoints(
            self.directory / "checkpoints",
            keep_last=config.exp_manager.checkpoint_callback_params.keep_last,
            groups=self.groups,
            say=self.say,
            check_owner=self.folder.check_same,
        )
        if self._writes_checkpoints:
            self.checkpoints.check_space(self.policy.trainable)
        self._profiler = StepProfiler(config.trainer.profile, self.directory / "profile", self.groups.rank)
        self.start_step = self._resume()
        self.logger = self._build_logger()
        parts.callback(self.logger.close)
        self.collector: Collector | None = None
        if engine is not None:
            scorer = build_scorer(config, self.inputs.tokenizer, cpu_group=self.groups.cpu_group)
            parts.callback(scorer.close)
            size = config.policy.train_global_batch_size
            log_probs_of = partial(self.policy.log_probs_of, batch_size=size, row_unit=config.row_unit)
            self.collector = Collector(engine, scorer, config.trainer.seed, self.timer, log_probs_of)
        self._weight_sync = WeightSync(config, self.policy.trainable)
        if config.trainer.stage == "rl":
            self.publish(version=self.start_step)

    # ------------------------------------------------------------------------------------------------ around a step

    def steps(self) -> Iterator[int]:
        """Yield the steps still to do, counted from 0: up to ``max_steps``, or until ``max_generated_tokens`` are sampled."""
        for step in range(self.start_step, self.config.trainer.max_steps):
            if self._is_budget_spent:
                return
            self.timer.flush()
            self._generated_at_start = self.rollouts.num_generated_tokens if self.collector is not None else 0
            self._step_started, self._is_first_step = time.monotonic(), step == self.start_step
            activity.set_step(step + 1)
            if self._numerics is not None and (step + 1) % self.config.trainer.numerics.every_n_steps == 0:
                self._numerics.watch()
            with self._profiler.step(step + 1):
                yield step

    def finish_step(self, done: int, updates: Sequence[Mapping[str, float]], samples: Sequence[TrainingSample]) -> None:
        """Log a step; evaluate and save where it is time to.

        Args:
            done: steps done, this one included.
            updates: what each ``train_step`` returned.
            samples: the rows trained on.
        """
        self.checkpoints.poll()
        trained = [sample for sample in samples if sample.weights is not None]
        metrics = update_metrics(updates) | sample_metrics(trained, self.groups.cpu_group)
        if self._rollout_metrics:
            generated = self.rollouts.num_generated_tokens - self._generated_at_start
            self.num_generated_tokens += generated
            metrics["rollout/generated_tokens"] = float(generated)
            metrics["rollout/generated_tokens_total"] = float(self.num_generated_tokens)
            metrics |= self._rollout_metrics
            metrics |= self.online_algorithm.step_metrics() | self.rollouts.engine.metrics()
            metrics |= self._weight_sync.metrics
        if self._numerics is not None:
            metrics |= self._numerics.finish_step(done, self.directory / "numerics", self.say)
        texts = self._write_texts(done)
        seconds = time.monotonic() - self._step_started
        metrics |= self.timer.flush(seconds) | self.checkpoints.take_metrics()
        metrics["memory/resident_bytes"] = float(resident_bytes())
        if self.reference:
            metrics["memory/reference_bytes"] = float(sum(weight.nbytes for weight in self.reference))
        metrics["tokens_per_s"] = metrics["num_tokens"] / seconds
        metrics["tokens_per_s_per_device"] = metrics["tokens_per_s"] / self.groups.world_size
        metrics |= self.policy.efficiency(trained, num_passes=self.algorithm.num_epochs, times=metrics)
        with all_ranks_agree(self.groups.cpu_group):  # rank 0 writes, and its disk may be full, or gone
            self.folder.check_same()
            self.logger.log(done, metrics)
            self.logger.log_rollouts(done, texts, self.config.exp_manager.rollout_texts)
        every = self.config.eval.every_n_steps
        if self._is_last(done) and self.config.eval.after:
            metrics |= self._evaluate(done, self.config.eval.num_samples)
        elif every and done % every == 0:
            metrics |= self._evaluate(done, self.config.eval.num_samples_during)
        is_best = self.best.offer(done, metrics)
        self._export_if_due(done, is_best=is_best)
        self._save_if_due(done, is_best=is_best)

    def _write_texts(self, done: int) -> list[dict[str, Any]]:
        """Write what the model wrote, where it is time to; return it, on the first rank."""
        if not (self._rollout_metrics and self._texts.is_due(done)):
            return []
        with self.timer("record"), all_ranks_agree(self.groups.cpu_group):
            self.folder.check_same()
            return self._texts.write(done) if self.is_first else []

    @property
    def _is_budget_spent(self) -> bool:
        budget = self.config.trainer.max_generated_tokens
        return budget is not None and self.num_generated_tokens >= budget

    def _is_last(self, done: int) -> bool:
        return done == self.config.trainer.max_steps or self._is_budget_spent

    def samples(self, groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """Return the rows of a step, after which its groups are needed no more; take from them what is logged or kept.

        If stored rows cannot be read, all ranks end with the same error.
        """
        algorithm = self.online_algorithm
        self.checkpoints.poll()
        with all_ranks_agree(self.groups.cpu_group):
            samples = algorithm.samples(groups, step)
            if self.is_first:
                algorithm.keep(self.directory, groups, self.inputs.tokenizer, step=step + 1)
                if self._texts.is_due(step + 1):
                    self._texts.take(groups, samples)
        self._rollout_metrics = rollout_metrics(groups, version=step)
        return samples

    def fill(self, samples: Sequence[TrainingSample], needs: frozenset[str]) -> None:
        """Set the per-token vectors that a method needs before it gives credit, by forward passes.

        A first update can bring ``old_log_probs`` from its own pass, so ``passes_ahead`` may leave its rows out. In the
        first step of a run it does not: a pass ahead of it shows that both give the same bits (the ratio is exactly 1).

        Args:
            samples: all rows of the step, on every rank. A row keeps a vector that it has already.
            needs: names among ``algorithms.parts.base.NEEDS``; ``entropy`` comes with ``old_log_probs``.
        """
        policy, algorithm = self.policy, self.algorithm
        if needs & {"old_log_probs", "entropy"}:
            policy.fill_log_probs(samples, algorithm.passes_ahead(samples), "old_log_probs", *needs & {"entropy"})
        if "ref_log_probs" in needs:
            with policy.trainable.weights_of(self.reference):
                policy.fill_log_probs(samples, algorithm.mini_batches(samples), "ref_log_probs")
        if "old_log_probs" in needs and self._is_first_step:
            policy.fill_log_probs(samples, algorithm.updates(samples)[:1], "old_log_probs")

    @property
    def online_algorithm(self) -> OnlineAlgorithm:
        """The algorithm of an online run."""
        assert isinstance(self.algorithm, OnlineAlgorithm)
        return self.algorithm

    @property
    def rollouts(self) -> Collector:
        """The part that samples and scores; a supervised run without evaluation has none."""
        assert self.collector is not None
        return self.collector

    def evaluate_before(self) -> None:
        """Evaluate the initial model, as step 0."""
        if self.config.eval.before and self.start_step == 0:
            self._evaluate(0, self.config.eval.num_samples)

    def release_engine_memory(self) -> None:
        """Release a colocated engine's GPU memory for the training phase. None of its servers starts before ``publish``."""
        with self.timer("weight_sync"):
            self.rollouts.engine.release_memory()

    def publish(self, *, version: int) -> None:
        """Give the engine the current weights, and the memory that the trainer can spare."""
        self._make_room()
        with self.timer("weight_sync"):
            self.rollouts.engine.resume_memory()
        self._weight_sync.publish(self.rollouts.engine, version=version)

    def _make_room(self) -> None:
        """Release the memory that only updates need, until an update or a checkpoint brings it back."""
        if self.config.offloads_during_rollouts:
            with self.timer("offload"):
                self.policy.trainable.update_memory.release()
        if self.config.rollout.is_colocated and self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()  # of what building, updating or loading has left

    @activity.phase("finish")
    def finish(self) -> None:
        """Export the model, plot the curves; write the summary last, which tells that the run is finished.

        Raises:
            UserError: on all ranks, the model could not be exported; all else is there then.
        """
        failure: UserError | None = None
        if self.config.exp_manager.export_hf:
            try:
                self._export("hf")
            except UserError as error:
                failure = error
        self.logger.close()
        if self.is_first:
            plot_curves(self.logger.path, self.directory / "curves.png")
            sum_up(
                self.directory,
                self.logger.rows(),
                engine=self.config.rollout.engine,
                k_values=self.config.eval.k_values,
                seconds=time.monotonic() - self.started,
                origin=self.checkpoints.origin,
                is_exported=self.config.exp_manager.export_hf and failure is None,
                settings=self._settings,
            )
        if failure is not None:
            raise failure

    @activity.phase("export")
    def _export_if_due(self, done: int, *, is_best: bool) -> None:
        """Write the exports of a step; tell its rank among the best. What a full disk refuses ends the run."""
        manager, best = self.config.exp_manager, self.best.steps
        if is_best and best[0] == done and manager.export_hf_best:
            with all_ranks_agree(self.groups.cpu_group):  # a kill must not leave new weights under an old step's name
                if self.is_first:
                    self.best.write(self.directory, exported=None)
            self._export(BEST_EXPORT)
            self._exported_best = done
        every = manager.export_hf_every_n_steps
        if is_exported := bool(every and done % every == 0):
            self._export(f"{STEP_EXPORTS}{done:08d}")
        with all_ranks_agree(self.groups.cpu_group):
            if is_best and self.is_first:
                self.best.write(self.directory, exported=self._exported_best)
            if is_exported and self.is_first:
                self.folder.prune_exports(keep_last=manager.checkpoint_callback_params.keep_last, keep=best)

    def _export(self, name: str) -> None:
        source, target = self.config.policy.model_dir, self.directory / name
        was_there = target.is_dir()
        export_hf(self.policy.chunks, self.shape, self.groups, source=source, target=target)
        self.say(f"Hugging Face checkpoint: {target}" + (", in place of an earlier one" if was_there else ""))

    def say(self, message: str) -> None:
        """Print one line for the user, from rank 0."""
        if self.is_first:
            print(message, flush=True)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        with self._parts:
            if isinstance(error, UserError):
                self.checkpoints.complete_at_error()

    # ------------------------------------------------------------------------------------------------ parts

    def _build_model(self) -> Trainable:
        optim = self.config.policy.optim if self.is_trained else None
        fill = start_weights(self.config, self.shape, self.groups)
        return Trainable(self.config, self.shape, self.groups, optim=optim, fill_weights=fill, timer=self.timer)

    def _resume(self) -> int:
        manager = self.config.exp_manager
        self._fixed = fixed_settings(self.config, self.shape, self.inputs.pool_contents)
        self._settings = result_settings(self.config) if self.is_first else {}  # now: files may change under a long run
        path, step = self.checkpoints.find(manager.resume_from_checkpoint, is_resuming=manager.resume_if_exists), 0
        is_own, self._num_rows, best = False, 0, None
        if path is not None and not self.is_trained:
            step = int(self.checkpoints.load(path, self.policy.trainable)["step"])
        elif path is not None:
            state = self.checkpoints.load(path, self.policy.trainable, self._fixed)
            self.inputs.stream.load_state(state)
            self.algorithm.load_state(self.checkpoints.load_tensors(path))
            step, self.num_generated_tokens = int(state["step"]), int(state.get("generated_tokens", 0))
            is_own = path.resolve().parent == self.checkpoints.directory.resolve()
            if is_own:
                self._num_rows, best = int(state.get("num_rows", 0)), state.get("best")
            self.say(f"resuming after step {step}: {path}")
        self.best = BestSteps(manager.checkpoint_callback_params, best, self.say)
        with all_ranks_agree(self.groups.cpu_group):
            if self.is_first:
                if self.is_trained:
                    others = self.checkpoints.others(path) if is_own else []
                    self.folder.start_at(step if is_own else None, others)
                    self._exported_best = self.folder.keep_best(step)
                    self.best.correct(self.directory, exported=self._exported_best)
                save_resolved(self.config, self.directory / "config.yaml")
        self.checkpoints.protected = self.best.steps
        return step

    @property
    def _writes_checkpoints(self) -> bool:
        return self.is_trained and self.config.exp_manager.create_checkpoint_callback

    def _save_if_due(self, done: int, *, is_best: bool) -> None:
        callback = self.config.exp_manager.checkpoint_callback_params
        is_last = self._is_last(done)
        if self._writes_checkpoints and (done % callback.every_n_train_steps == 0 or is_last or is_best):
            self.checkpoints.complete()  # of the one before, beside what was best before this step
            self.checkpoints.protected = self.best.steps
            is_away = self.policy.trainable.update_memory.is_released
            if is_away:  # a checkpoint needs the optimizer's state, whose place the engine may have taken
                self.release_engine_memory()
            state = {"step": done, "fixed": self._fixed, "generated_tokens": self.num_generated_tokens}
            state["best"] = self.best.state()
            with all_ranks_agree(self.groups.cpu_group):
                self.folder.check_same()
                state["num_rows"] = self.logger.sync()  # a checkpoint has all rows up to its step
            state |= self.inputs.stream.state()
            save = self.checkpoints.start if callback.async_save and not is_last else self.checkpoints.save
            save(done, self.policy.trainable, state, self.algorithm.state())
            if is_away and self.config.trainer.stage == "rl" and not is_last:
                self.publish(version=done)

    def _build_logger(self) -> MetricsLogger:
        with all_ranks_agree(self.groups.cpu_group):
            manager, steps = self.config.exp_manager, self.config.trainer.max_steps
            sinks = build_sinks(manager, self.directory, run_config=shown(self.config)) if self.is_first else ()
            logger = MetricsLogger(self.directory, total_steps=steps, sinks=sinks, is_writer=self.is_first)
            # A fresh run starts without rows; a resumed one keeps those up to its checkpoint.
            logger.resume_at(self.start_step if self.start_step else -1)
            if self.is_first and (lost := self._num_rows - logger.num_rows) > 0:
                self.say(f"{logger.path} lacks {lost} of {self._num_rows} rows up to step {self.start_step}")
        return logger

    def _build_engine(self) -> RolloutEngine:
        inputs = self.inputs
        model = served_model(
            self.config,
            self.shape,
            stop_ids=inputs.stop_ids,
            pad_id=inputs.tokenizer.pad_token_id,
            longest_request=inputs.longest_request,
        )
        return build_engine(self.config, model, device=self.runtime.device, cpu_group=self.groups.cpu_group)

    @activity.phase("evaluation")
    def _evaluate(self, done: int, num_samples: int) -> dict[str, float]:
        started = time.monotonic()
        distance: dict[str, float] = {}
        probes = self.inputs.probes
        if probes:
            self.release_engine_memory()  # a pass of the trainer, which needs the memory of a colocated engine
            distance = distance_metrics(self.policy, probes, batch_size=self.config.row_unit)
        if probes or self.rollouts.engine.weight_version != done:
            self.publish(version=done)
        metrics = self.held_out.evaluate(self.rollouts, step=done, num_samples=num_samples) | distance
        if self.config.trainer.stage == "sft":  # nothing else is sampled until the next evaluation
            self.release_engine_memory()
        self.timer.flush()  # evaluation has its own figure and does not count into a step
        with all_ranks_agree(self.groups.cpu_group):
            self.folder.check_same()
            self.held_out.save()
            groups = self.held_out.take_groups()
            if self.is_first:
                self._texts.write_evaluation(done, groups)
            self.logger.log_eval(done, metrics | {"eval/seconds": time.monotonic() - started})
        return metrics
