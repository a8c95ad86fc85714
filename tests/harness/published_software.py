"""Software of published runs: what a source says about kernels, overlap and memory, as facts."""

from megaswift.planner.software import Software

KERNELS = {  # the sweep's names of attention kernels
    "torch": "scores",
    "fused": "scores_fused",
    "flash_attentionv1.0.8": "flash1",
    "flash_attention2": "flash2",
    "flash_attention2 + RMS kernel": "flash2",
}


def sequence_parallel(row: dict[str, str]) -> bool:
    """Say whether a run with tp > 1 shards the sequence too: everything since Korthikanti et al. does."""
    if row["source"].startswith("Hagemann"):
        return "sequence_parallel=True" in row["notes"]
    return not row["source"].startswith(("Narayanan", "BLOOM", "vTrain"))


def software_of(row: dict[str, str]) -> Software:
    """Return the software of a row's source."""
    source, notes = row["source"], row["notes"]
    if source.startswith("Hagemann"):
        return _hagemann(notes.split(";")[0].removeprefix("kernel="))
    if source.startswith(("Narayanan", "Korthikanti", "BLOOM", "vTrain")):
        # Megatron-LM of 2021 and 2022: fused softmax, dropout but for BLOOM, gradients reduced after the last pass.
        return Software(
            attention="scores_fused",
            dropout=not source.startswith("BLOOM"),
            loss_tokens=None,
            loss_bytes=8,
            overlap_data=False,
            expandable_segments=False,
        )
    if source.startswith("torchtitan"):
        compiled = "compile" in notes
        return Software(
            attention="flash2",  # scaled_dot_product_attention
            fused_norm=compiled,
            fused_elementwise=compiled,
            loss_tokens=None,
            loss_bytes=14,  # bf16 logits, fp32 copy, log-softmax and its gradient
            wgrad_fusion=False,
            overlap_tensor="async TP" in notes or "AsyncTP" in notes,
            tensor_engine=False,
        )
    blackwell = row["gpu"].startswith(("B", "GB"))
    bridge = source.startswith("Megatron-Bridge")
    return Software(
        loss_tokens=None,
        loss_bytes=6,
        overlap_tensor=bridge or source.startswith(("NeMo", "DGXC", "Megatron-LM README")),
        # Bridge's recipes on Blackwell capture the iteration and overlap the all-to-all; some releases do not repeat it.
        overlap_experts=bridge and (blackwell or "moe_a2a_overlap" in notes),
        deduplicated_dispatch=bridge,
        cuda_graphs=bridge and (blackwell or "cuda_graph" in notes),
    )


def _hagemann(kernel: str) -> Software:
    """Plain PyTorch of 2023 but for attention and, in the best rows, the norm; bf16 gradients (DeepSpeed's ZeRO-1).

    `loss_bytes`: the whole vocabulary gathered on every rank; bf16 logits twice, fp32 copy, softmax, logarithm and two
    gradients, 24 bytes in all.
    """
    return Software(
        attention=KERNELS[kernel],
        fused_norm="RMS" in kernel,
        fused_elementwise=False,
        loss_tokens=None,
        loss_bytes=24,
        gathered_loss=True,
        gradient_bytes=2,
        wgrad_fusion=False,
        overlap_data=False,
        expandable_segments=False,
        tensor_engine=False,
    )
