"""The fresh process that proves a run's adapter, which may already run while the gate measures."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from nested_core.config.schema import FineTuneConfig
from nested_core.gate.evidence.run_evidence import RunEvidence
from nested_core.gate.evidence.training_divergence import Divergence
from nested_core.gate.proof.canary import CanaryPrompt, choose_canary_prompts
from nested_core.gate.proof.fresh_process_check import ProofRequest, RunningProof
from nested_core.models.base_model import find_model_folder, model_compute_dtype
from nested_core.models.session import Session, frozen_tensors


class ProofOfRun:
    """The proof of a run's adapter, whose process starts early if memory allows it."""

    def __init__(
        self,
        config: FineTuneConfig,
        evidence: RunEvidence,
        divergence: Divergence | None,
        session: Session,
    ) -> None:
        """Create it for a run's evidence; the process is not started yet."""
        self._session = session
        prompt_format = evidence.dataset.prompt_format
        self.questions: Sequence[CanaryPrompt] = choose_canary_prompts(config, prompt_format)
        # To a fresh process that reads both adapters from disk. It computes their logits on the
        # prompts whose logits the trainer recorded, so that the two can be compared, and their
        # answers to the questions, which are stored with the adapter, so that a server can check
        # later that it computes the same.
        logits, dtype = evidence.record.logits, model_compute_dtype(config)
        self.request = ProofRequest(
            model=find_model_folder(config.model),
            initial=evidence.before.path,
            trained=evidence.after.path,
            prompts=logits.prompts,
            columns=logits.columns,
            expected=logits.values,
            is_float32=dtype is not None and dtype == mx.float32,
            trusts_remote_code=config.trust_remote_code,
            questions=[question.tokens for question in self.questions],
            has_diverged=divergence is not None and divergence.has_risen,
        )
        self.running: RunningProof | None = None

    def begin(self) -> RunningProof:
        """Start the process unless it already runs, and return it."""
        if self.running is None:
            self.running = RunningProof(self.request, self._session.take_proof_process())
        return self.running

    def close(self) -> None:
        """End the process if it was started."""
        if self.running is not None:
            self.running.close()

    def begin_if_there_is_room(self) -> None:
        """Start the process now if two base models need no more memory than training did."""
        base = self._session.base
        if base is None or base.training_peak == 0:
            return
        frozen = sum(array.nbytes for array in frozen_tensors(base.model).values())
        if base.evaluation_peak + frozen <= base.training_peak:
            self.begin()
