"""The system/ scalars that fine-tuning and deployment write for TensorBoard."""

from __future__ import annotations

from torch.utils.tensorboard.writer import SummaryWriter

from env.system import StepResult

__all__ = ["log_system"]


def log_system(writer: SummaryWriter, step: int, result: StepResult) -> None:
    """Write one interval of a running system (batch 1)."""
    state, record = result.state, result.record
    writer.add_scalar("system/in_flight", float(state.in_flight[0]), step)
    writer.add_scalar("system/lost", float(record.lost[0]), step)
    if record.completed[0]:
        latency = float(record.latency_sum_s[0] / record.completed[0])
        writer.add_scalar("system/latency_s", latency, step)
    for hop, rate in enumerate(state.bytes_per_s[0]):
        writer.add_scalar(f"system/hop{hop}_mbps", float(rate) * 8e-6, step)
    for node, load in enumerate(state.node_load[0]):
        writer.add_scalar(f"system/node{node}_load", float(load), step)
        writer.add_scalar(
            f"system/node{node}_backlog_s", float(state.node_backlog_s[0, node]), step
        )
