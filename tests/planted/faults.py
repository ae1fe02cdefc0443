"""The faults that `python -m tests.planted` plants, one at a time: at least two in each room."""

from __future__ import annotations

from tests.planted.planting import Fault

FAULTS = (
    Fault("nested_core/errors.py", "exit_code = 4", "exit_code = 1", "a wrong exit code"),
    Fault(
        "nested_core/errors.py",
        '[*map(str, values[:count]), *(["..."] if len(values) > count else [])]',
        '[*map(str, values[:count]), *(["..."] if len(values) >= count else [])]',
        "a comparison turned",
    ),
    Fault(
        "nested_core/backend.py",
        "    if came_too_late:\n        lost = (",
        "    if came_too_late and not came_too_late:\n        lost = (",
        "a check skipped",
    ),
    Fault(
        "nested_core/backend.py",
        "        folder.use()\n    if is_mlx_built_for_cuda():",
        "        pass\n    if is_mlx_built_for_cuda():",
        "a forgotten call",
    ),
    Fault(
        "nested_core/seams.py", "if is_there(name)}", "if not is_there(name)}", "a condition turned"
    ),
    Fault(
        "nested_core/seams.py", "if not is_there(room):", "if is_there(room):", "a condition turned"
    ),
    Fault(
        "nested_core/storage/atomic.py",
        "        sync_path(path)\n    if confirm is not None:",
        "        path.exists()\n    if confirm is not None:",
        "an fsync dropped",
    ),
    Fault(
        "nested_core/records/verdict_file.py",
        '    if document["verdict"] == "passed" and verdict.reasons:',
        '    if document["verdict"] == "failed" and verdict.reasons:',
        "a condition turned",
    ),
    Fault(
        "nested_core/storage/manifest.py",
        "        if not matches_entry(folder / name, expected):",
        "        if not (folder / name).exists():",
        "a check skipped",
    ),
    Fault(
        "nested_core/config/resume.py",
        "    if before == after or name in allowed:",
        "    if before == after or allowed:",
        "a check skipped",
    ),
    Fault(
        "nested_core/config/sections.py",
        '        if self.promote != "never" and self.path is None:',
        '        if self.promote == "always" and self.path is None:',
        "a comparison turned",
    ),
    Fault(
        "nested_core/text/foreign_text.py",
        "code not in (0x2028, 0x2029)",
        "code not in (0x2028,)",
        "a forgotten case",
    ),
    Fault(
        "nested_core/text/duration_format.py",
        "    if minutes < 100:",
        "    if minutes <= 100:",
        "a comparison turned",
    ),
    Fault(
        "nested_core/models/generation.py",
        "        return not self.text.strip()",
        "        return not self.text",
        "a forgotten call",
    ),
    Fault(
        "nested_core/models/adapter_fit.py",
        'for key, line in changes.items() if misfits or key == "scale"]',
        "for key, line in changes.items() if misfits]",
        "a forgotten case",
    ),
    Fault(
        "nested_core/measure/answers/scorers.py",
        'return Decimal(re.sub(_GROUP_PATTERN, "", numbers[-1])',
        'return Decimal(re.sub(_GROUP_PATTERN, "", numbers[0])',
        "the wrong end",
    ),
    Fault(
        "nested_core/measure/answers/scorers.py",
        'return " ".join(unicodedata.normalize("NFC", text).split())',
        'return " ".join(text.split())',
        "a forgotten call",
    ),
    Fault(
        "nested_core/rooms/peft/peft_format.py",
        'axis = 1 if leaf_name(name) == "lora_a" else 0',
        'axis = 0 if leaf_name(name) == "lora_a" else 1',
        "a wrong axis",
    ),
    Fault(
        "nested_core/optim/tiered.py",
        "for i, tier in enumerate(self.tiers) if n % tier.frequency == 0)",
        "for i, tier in enumerate(self.tiers) if (n - 1) % tier.frequency == 0)",
        "off by one",
    ),
    Fault(
        "nested_core/optim/named_updates.py",
        "    if (new.shape, new.dtype) != (old.shape, old.dtype):",
        "    if new.shape != old.shape:",
        "a forgotten field",
    ),
    Fault(
        "nested_core/data/tokens/tokenized_split.py",
        '        if not path.is_file() or path.stat().st_size != expected["bytes"]:',
        "        if not path.is_file():",
        "a check skipped",
    ),
    Fault(
        "nested_core/data/tokens/example_encoding.py",
        '        if request["drops_overlong"] and len(encoded.tokens) > max_seq_length:',
        '        if request["drops_overlong"] and len(encoded.tokens) >= max_seq_length:',
        "a comparison turned",
    ),
    Fault(
        "nested_core/rooms/secrets/sensitive_data.py",
        "    return 8 <= len(digits) <= 15 and",
        "    return 8 < len(digits) <= 15 and",
        "a comparison turned",
    ),
    Fault(
        "nested_core/rooms/serve/http_handler.py",
        "self.server.follower.find_version(name, wanted)",
        "names[name].current",
        "a forgotten field",
    ),
    Fault(
        "nested_core/rooms/serve/served_version.py",
        "    if other_base := describe_other_base(adapter.config, base):",
        "    if other_base := describe_other_base({}, base):",
        "a check skipped",
    ),
    Fault(
        "nested_core/gate/evidence/run_evidence.py",
        "    if digests_for_result(run, offered, checkpoint.manifest) != result.evidence:",
        "    if not digests_for_result(run, offered, checkpoint.manifest):",
        "a check skipped",
    ),
    Fault(
        "nested_core/records/verdict.py",
        "        return self.kl_initial is not None and self.kl_initial <= bound",
        "        return self.kl_initial is not None and self.kl_initial >= bound",
        "a comparison turned",
    ),
    Fault(
        "nested_core/gate/evidence/run_evidence.py",
        "        return self.had_gradient(name) and not has_moved",
        "        return self.had_gradient(name) and has_moved",
        "a condition turned",
    ),
    Fault(
        "nested_core/kernels/quantized_linear.py",
        '        return output + module.bias if "bias" in module else output',
        "        return output",
        "a forgotten case",
    ),
    Fault(
        "nested_core/kernels/self_check.py",
        "        if not difference <= TOLERANCE * largest:",
        "        if difference > TOLERANCE * largest:",
        "a comparison turned",
    ),
    Fault(
        "nested_core/rooms/cuda/blocked_attention.py",
        "    return mx.concatenate(columns, axis=3)",
        "    return mx.concatenate(columns[::-1], axis=3)",
        "a wrong order",
    ),
    Fault(
        "nested_core/rooms/cuda/swiglu.py",
        "(c * b * (s + a * s * (1 - s)))",
        "(c * b * (s - a * s * (1 - s)))",
        "a sign changed",
    ),
    Fault(
        "nested_core/training/training_checks.py",
        "    if not is_moving and not has_learned:",
        "    if not is_moving and has_learned:",
        "a condition turned",
    ),
    Fault(
        "nested_core/records/plan.py",
        "if 0 < step <= first_step))",
        "if 0 <= step < first_step))",
        "a comparison turned",
    ),
    Fault(
        "nested_core/training/loss/cross_entropy.py",
        "        return self.position_losses(tokens, rows).sum(), (rows >= 0).sum()",
        "        return self.position_losses(tokens, rows).sum(), (rows > 0).sum()",
        "a comparison turned",
    ),
    Fault(
        "nested_core/registry/registration.py",
        "        if entries[file] != bound.files.get(source):",
        "        if source not in bound.files:",
        "a check skipped",
    ),
    Fault(
        "nested_core/process/child.py",
        "            os.killpg(self.process.pid, signal.SIGKILL)",
        "            os.kill(self.process.pid, signal.SIGKILL)",
        "what a process started is left",
    ),
    Fault(
        "nested_core/registry/ledger.py",
        "        os.ftruncate(descriptor, ledger.whole_bytes)\n        sync_descriptor(descriptor)",
        "        os.ftruncate(descriptor, ledger.whole_bytes)",
        "an fsync dropped",
    ),
    Fault(
        "nested_core/pipeline/continual.py",
        "    return champion if now == tuple(map(provenance.get, keys)) else None",
        "    return champion",
        "a check skipped",
    ),
    Fault(
        "nested_core/pipeline/preflight.py",
        '    if config.nested.slow_gradients == "accumulate":',
        '    if config.nested.slow_gradients != "accumulate":',
        "a comparison turned",
    ),
    Fault(
        "tasks/retrying.py",
        "    return is_transient(error) or isinstance(error, MemoryError)",
        "    return is_transient(error) and isinstance(error, MemoryError)",
        "a condition turned",
    ),
    Fault(
        "nested_core/report/outcome.py",
        'if run.state == "never began" else run.state',
        'if run.state != "never began" else run.state',
        "a comparison turned",
    ),
    Fault(
        "nested_core/report/outcome.py",
        '    if last.action == "rollback" and last.previous == version:',
        '    if last.action == "promote" and last.previous == version:',
        "a wrong name",
    ),
    Fault(
        "nested_core/process/child.py",
        '        if described["module"] == errors.__name__ and is_ours:',
        "        if is_ours:",
        "a check skipped",
    ),
    Fault(
        "nested_core/rooms/export/judgement.py",
        "    if reading.chat_template != adapter.chat_template:",
        "    if reading.chat_template is None != adapter.chat_template:",
        "a check skipped",
    ),
    Fault(
        "nested_core/rooms/export/judgement.py",
        "    if not logits.distance <= logits.bound:",
        "    if logits.distance < logits.bound:",
        "a condition turned",
    ),
    Fault(
        "nested_core/rooms/sweep/search.py",
        "    if difference is None or difference.mean > -least:",
        "    if difference is None or difference.mean < -least:",
        "a comparison turned",
    ),
    Fault(
        "flows/rooms/nights/warning_events.py",
        "    if now - since <= timedelta(days=nights):",
        "    if now - since >= timedelta(days=nights):",
        "a sign changed",
    ),
    Fault(
        "flows/process/stop_signals.py",
        "        if self._is_stopping:\n            trainer.stop_training()",
        "        if not self._is_stopping:\n            trainer.stop_training()",
        "a condition turned",
    ),
    Fault(
        "tasks/retrying.py",
        "    return isinstance(error, OSError) and error.errno not in PERMANENT_ERRNOS",
        "    return isinstance(error, OSError) and error.errno in PERMANENT_ERRNOS",
        "a condition turned",
    ),
)
