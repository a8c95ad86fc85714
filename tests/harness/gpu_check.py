"""Run every kernel on the GPU against its reference, timed against what the device can do: `make gpu-check`.

Without a GPU it says so and claims nothing.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton

from megaswift.kernels.context_attention import blocks_cuda
from megaswift.kernels.context_attention.index import rank_tokens
from megaswift.kernels.context_attention.ops import context_attention
from megaswift.kernels.context_attention.partial import HeadSizes, Partial
from megaswift.kernels.context_attention.plan import ContextPlan, make_plan
from megaswift.kernels.context_attention.reference import attention
from megaswift.kernels.context_attention.segments import Pattern, gathered_segments, ring_segments
from megaswift.kernels.dispatch import Implementation
from megaswift.models.flash import flash_attention, has_flash
from tests.harness.kernel_cases import CASES, Case, Sizes

SMALL = Sizes(lengths=[5, 0, 333, 1, 77], heads=4, dim=64, vocabulary=1003)
LARGE = Sizes(lengths=[8192, 3001, 5000, 191], heads=16, dim=128, vocabulary=131072)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS, GROUPS, HEAD_SIZE = 8, 2, 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    right: bool
    error: float
    time_ms: float | None = None
    of_limit: str = ""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this device was measured to do."""

    copy_bytes_per_s: float  # read and written
    flops_per_s: float  # bf16 matrix product


def time_s(function: Callable[[], object], *, repeats: int = 20) -> float:
    """Return the median seconds of one call on the device, after two calls to warm up."""
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[repeats // 2]


def measure_limits() -> Limits:
    """Time a copy of 1 GiB and an 8192-cubed bf16 product."""
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy_s, product_s = time_s(block.clone), time_s(lambda: matrix @ matrix)
    return Limits(copy_bytes_per_s=2 * block.nbytes / copy_s, flops_per_s=2 * 8192**3 / product_s)


def largest_error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest difference relative to the largest value (at least 1); inf where NaN differs."""
    worst = 0.0
    for mine, theirs in zip(got, wanted, strict=True):
        if mine.shape != theirs.shape or not torch.equal(mine.isfinite(), theirs.isfinite()):
            return float("inf")
        finite = theirs.isfinite()
        mine, theirs = mine[finite].double(), theirs[finite].double()
        if theirs.numel():
            worst = max(worst, float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1.0)))
    return worst


def with_gradients(case: Case, how: Implementation, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return outputs and gradients of one case."""
    leaves = tuple(
        x.detach().clone().requires_grad_(place < case.differentiable) for place, x in enumerate(inputs)
    )
    outputs = case.run(how, *leaves)
    if not case.differentiable:
        return list(outputs)
    return [
        *outputs,
        *torch.autograd.grad(
            outputs, leaves[: case.differentiable], [torch.ones_like(out) for out in outputs]
        ),
    ]


def check_kernels(limits: Limits) -> Iterator[Row]:
    """Yield every kernel: right in all types on small input, timed forward in bf16 on large input."""
    for case in CASES:
        errors = []
        for dtype in DTYPES:
            inputs = case.make(SMALL, dtype, "cuda")
            error = largest_error(
                *(
                    with_gradients(case, how, inputs)
                    for how in (Implementation.TRITON, Implementation.REFERENCE)
                )
            )
            errors.append((error, error <= case.tolerance[dtype]))
        inputs = case.make(LARGE, torch.bfloat16, "cuda")
        outputs = case.run(Implementation.TRITON, *inputs)
        seconds = time_s(lambda case=case, inputs=inputs: case.run(Implementation.TRITON, *inputs))
        if case.name.startswith("linear_cross_entropy"):
            tokens, dim = inputs[0].shape
            share = 2 * tokens * dim * LARGE.vocabulary / seconds / limits.flops_per_s
            of_limit = f"{share:.0%} of matrix product"
        else:
            moved = sum(x.nbytes for x in (*inputs, *outputs))
            of_limit = f"{moved / seconds / limits.copy_bytes_per_s:.0%} of copy"
        yield Row(
            name=case.name,
            right=all(ok for _, ok in errors),
            error=max(error for error, _ in errors),
            time_ms=seconds * 1e3,
            of_limit=of_limit,
        )


def check_attention(limits: Limits) -> Iterator[Row]:
    """Yield attention on one rank, and the steps of four ring ranks one after another on this GPU."""
    lengths = [333, 1, 64, 2, 100, 12]
    inputs = [
        torch.randn(sum(lengths), heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    for causal, window in ((True, None), (False, None), (True, 50)):
        pattern = Pattern(causal=causal, window=window, scale=HEAD_SIZE**-0.5)
        name = f"attention causal={causal} window={window}"
        wanted = _attention_gradients(
            lambda *x, p=pattern: attention(*x, lengths, p), [x.double().cpu() for x in inputs]
        )
        got = _attention_gradients(
            lambda *x, p=pattern: context_attention(*x, make_plan(lengths), pattern=p), inputs
        )
        yield _attention_row(f"{name}, one rank", got, wanted)
        plan = make_plan(lengths, ring=4)
        for ring in (True, False) if window is None else (False,):
            out = _four_ranks(inputs, pattern, ring=ring, plan=plan)
            yield _attention_row(f"{name}, {'ring' if ring else 'gathered keys'} of 4", [out], wanted[:1])
        packed = {
            "cu_seqlens": torch.tensor([0, *lengths], device="cuda").cumsum(0).int(),
            "longest": max(lengths),
        }
        if has_flash(inputs[0], inputs[2]):
            got = _attention_gradients(
                lambda *x, p=pattern, packed=packed: flash_attention(
                    *x, **packed, causal=p.causal, window=p.window, scale=p.scale
                ),
                inputs,
            )
            yield _attention_row(f"{name}, torch's kernel", got, wanted)
    long = [torch.randn(16384, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8)]
    pattern = Pattern(scale=128**-0.5)
    seconds = time_s(lambda: context_attention(*long, make_plan([16384]), pattern=pattern), repeats=5)
    flops = 2 * 2 * 32 * 128 * 16384 * 16385 / 2
    share = f"{flops / seconds / limits.flops_per_s:.0%} of matrix product"
    yield Row(
        name="attention 16384 tokens, 32 heads of 128",
        right=True,
        error=0.0,
        time_ms=seconds * 1e3,
        of_limit=share,
    )


def _attention_gradients(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def _attention_row(name: str, got: list[torch.Tensor], wanted: list[torch.Tensor]) -> Row:
    error = largest_error([x.cpu() for x in got], wanted)
    return Row(name=name, right=error <= 2**-6, error=error)  # four roundings of bf16


def _four_ranks(
    inputs: list[torch.Tensor], pattern: Pattern, *, ring: bool, plan: ContextPlan
) -> torch.Tensor:
    """Return the output of all ranks of a ring, whose steps run here one after another without messages."""
    query, key, value = inputs
    out = torch.empty_like(query)
    sizes = HeadSizes(groups=GROUPS, key=HEAD_SIZE, value=HEAD_SIZE)
    row = torch.cat([key.flatten(1), value.flatten(1)], dim=1)
    held = [rank_tokens(plan, rank, torch.device("cuda")) for rank in range(plan.ring)]
    for rank, tokens in enumerate(held):
        partial = Partial.empty(query[tokens])
        if ring:
            steps = [
                (ring_segments(plan, pattern, rank, source), row[held[source]]) for source in range(plan.ring)
            ]
        else:
            steps = [(gathered_segments(plan, pattern, rank), row)]
        for segments, at_hand in steps:
            blocks_cuda.attend(partial, sizes.inputs(query[tokens], at_hand), segments, pattern)
        out[tokens] = partial.out_THK.to(out.dtype)
    return out


def check_fp8_step() -> Iterator[Row]:
    """Yield one Transformer Engine training step of a linear layer in FP8, timed against bf16."""
    if importlib.util.find_spec("transformer_engine") is None or torch.cuda.get_device_capability() < (8, 9):
        return
    import transformer_engine.pytorch as te  # here, because it takes ten seconds and may be absent

    layer = te.Linear(4096, 16384, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step(*, fp8: bool) -> torch.Tensor:
        with te.fp8_autocast(enabled=fp8):
            out = layer(x)
        out.sum().backward()
        return out

    with torch.no_grad():
        wanted = (x @ layer.weight.t() + layer.bias).float()
    got = step(fp8=True).float()
    error = float((got - wanted).norm() / wanted.norm())
    seconds, usual = time_s(lambda: step(fp8=True)), time_s(lambda: step(fp8=False))
    yield Row(
        name="Transformer Engine FP8 step",
        right=error < 2**-4,
        error=error,
        time_ms=seconds * 1e3,
        of_limit=f"{usual / seconds:.2f}x bf16",
    )


def main() -> None:
    """Print the table; exit 1 if a kernel is wrong."""
    if not torch.cuda.is_available():
        print("gpu-check: no GPU here, so nothing was checked.")
        return
    limits = measure_limits()
    rows = [*check_kernels(limits), *check_attention(limits), *check_fp8_step()]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(
        f"measured: copy {limits.copy_bytes_per_s / 1e9:.0f} GB/s, bf16 matrix product {limits.flops_per_s / 1e12:.0f} TFLOP/s\n"
    )
    print("| kernel | right | largest error | ms | of the limit |\n|---|---|--:|--:|---|")
    for row in rows:
        time_ms = "" if row.time_ms is None else f"{row.time_ms:.3f}"
        print(
            f"| {row.name} | {'yes' if row.right else 'NO'} | {row.error:.1e} | {time_ms} | {row.of_limit} |"
        )
    sys.exit(not all(row.right for row in rows))


if __name__ == "__main__":
    main()
