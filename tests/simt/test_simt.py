"""The emulator itself: wrong kernels are caught and named, right ones pass under every seed."""

from __future__ import annotations

import ctypes
import functools
import re

import pytest
import torch

from tests.simt import build

SEEDS = range(6)

# kernel -> what its report says, under every seed
WRONG = {
    "missing_barrier": "race in shared memory: .* with no barrier between",
    "missing_syncwarp": "race in shared memory: .* with no barrier between",
    "overwritten_tile": "race in shared memory: .* with no barrier between",
    "missing_cp_async_wait": "an asynchronous operation that .* issued at wrong.cu:.* nobody has waited for",
    "wrong_cp_async_group": "an asynchronous operation that .* issued at wrong.cu:.* nobody has waited for",
    "copy_behind_its_arrival": "an asynchronous operation that .* issued at wrong.cu:.* nobody has waited for",
    "overwritten_stage": "race in shared memory: .*",
    "divergent_shuffle": "divergent __shfl_(xor|down)_sync",
    "shuffle_with_returned_lane": "__shfl_xor_sync with mask ffffffff waits for lane 5, which has returned",
    "shuffle_mask_without_caller": "__shfl_xor_sync with mask 0000ffff by lane [0-9]+, which the mask does not name",
    "divergent_syncthreads": "divergent __syncthreads: .* waits at wrong.cu:[0-9]+ .*, but .* at wrong.cu:[0-9]+",
    "named_barrier_count": "bar.sync of barrier 1 for (64|32) threads, while others use it for (32|64)|deadlock",
    "named_barrier_deadlock": r"deadlock, every thread waits(.|\n)*32 threads wait in bar.sync at wrong.cu:.*\(barrier [12]\)",
    "shared_out_of_bounds": "out of bounds: a store of 4 bytes at byte 0x[0-9a-f]+ of shared memory, which has",
    "unmatched_cluster_arrive": "barrier.cluster.arrive twice without barrier.cluster.wait between",
    "cluster_wait_for_a_block_that_never_arrives": "deadlock, the threads that still run only poll",
    "missing_cluster_barrier": "race in shared memory: .*|shared memory of block [01] of the cluster, which has ended",
    # the copy may also have come before the wait, which is then for the phase after
    "wrong_mbarrier_phase": r"operation that .* issued at wrong.cu:.* nobody has waited for|deadlock(.|\n)*parity 1 of the mbarrier",
    "wrong_expected_bytes": r"deadlock.*(.|\n)*mbarrier.try_wait at wrong.cu:.*lacks 0 arrivals and 1024 bytes",
    "mbarrier_used_before_its_init_is_ordered": "mbarrier whose init by .* is not ordered before it|mbarrier that was never initialised",
    "missing_proxy_fence": "missing fence.proxy.async: cp.async.bulk",
    "missing_grid_barrier": r"deadlock(.|\n)*ld.acquire.gpu at wrong.cu",
    "accumulator_read_before_its_wait": "load of a register that the wgmma issued at wrong_wgmma.cu:.* is still writing",
    "accumulator_of_a_later_group": "load of a register that the wgmma issued at wrong_wgmma.cu:.* is still writing",
    "fragment_changed_before_its_wait": "store of a register that the wgmma issued at wrong_wgmma.cu:.* is still reading",
    "stage_overwritten_under_a_wgmma": "read by an asynchronous operation that .* issued at wrong_wgmma.cu:.* nobody has waited for",
    "missing_proxy_fence_before_wgmma": "missing fence.proxy.async: wgmma_m64k16_f16",
    "missing_barrier_before_wgmma": "race in shared memory: .* with no barrier between",
    "missing_wgmma_fence": "missing wgmma.fence: wgmma_m64k16_f16",
    "accumulator_not_named_by_its_wait": "wgmma_wait_group does not name the accumulators",
    "wgmma_by_one_warp": "wgmma_m64k16_f16 waits for warp [0-9]+, which has returned",
    "wgmma_tile_out_of_bounds": "out of bounds: wgmma_m64k16_f16 reads",
    "missing_proxy_fence_before_tensor_store": "missing fence.proxy.async: cp.async.bulk.tensor",
    "early_proxy_fence": "missing fence.proxy.async: cp.async.bulk.tensor",
    "box_at_no_multiple_of_its_pattern": "shared address 0x80 is not a multiple of 1024, at which its swizzle repeats",
    "box_out_of_shared_memory": "out of bounds: cp.async.bulk.tensor of 1024 bytes",
    "coordinates_of_another_rank": "cp.async.bulk.tensor with 3 coordinates, of a tensor map of rank 2",
    # when the box comes before anybody waits, the next phase lacks its arrival too
    "bytes_of_a_clipped_box": "deadlock(.|\n)*lacks [01] arrivals and -512 bytes",
    "box_read_before_its_wait": "operation that .* issued at wrong_tma.cu:.* nobody has waited for",
    "box_overwritten_before_it_is_stored": "operation that .* issued at wrong_tma.cu:.* nobody has waited for",
    "missing_griddepcontrol_wait": "missing griddepcontrol.wait: a load of global memory that the kernel before, wrong_control.cu",
    "cp_async_before_griddepcontrol_wait": "missing griddepcontrol.wait: cp.async of global memory that the kernel before",
    "missing_griddepcontrol_wait_in_a_chain": "missing griddepcontrol.wait: a load of global memory that the kernel before",
    "registers_beyond_the_file": "deadlock(.|\n)*setmaxnreg.inc at wrong_control.cu:.*to 240 registers from 168; the block has [0-9]+ left",
    "registers_of_half_a_warpgroup": "setmaxnreg.dec waits for warp [0-9]+, which has returned",
    "registers_increased_downwards": "setmaxnreg.inc to 24 registers of a warpgroup that has 256",
    "returned_before_the_store_has_read": "returned from the kernel while a bulk store may still read",
}
# ... under seed 0, which lets things happen as late as they may
WRONG_LATE = {
    "box_that_nobody_waits_for": "the block has ended while a bulk load that nobody waits for still writes",
}
RIGHT = ["barrier", "several_blocks", "cp_async_pipeline", "named_barriers", "bulk_pipeline", "cp_async_mbarrier", "cluster",
         "last_block", "grid_barrier", "registers", "dependent_launch"]  # fmt: skip


@functools.cache
def kernels() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.build("simt_kernels")))
    library.simt_run.restype = ctypes.c_char_p
    library.simt_run.argtypes = [ctypes.c_char_p, ctypes.c_ulonglong, ctypes.c_void_p]
    library.simt_run_ranks.restype = ctypes.c_char_p
    library.simt_run_ranks.argtypes = [ctypes.c_char_p, ctypes.c_ulonglong, ctypes.c_void_p, ctypes.c_int]
    return library


def run(name: str, seed: int) -> tuple[str, torch.Tensor]:
    data = torch.arange(4096, dtype=torch.float32)
    data[4000:] = 0
    return kernels().simt_run(name.encode(), seed, data.data_ptr()).decode(), data


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_caught_and_named(name: str, seed: int) -> None:
    with pytest.raises(RuntimeError, match=WRONG[name]):
        report, _ = run(name, seed)
        raise RuntimeError(report)
    assert "wrong" in report and ".cu" in report


@pytest.mark.parametrize("name", WRONG_LATE)
def test_wrong_kernels_are_caught_when_effects_come_late(name: str) -> None:
    report, _ = run(name, 0)
    assert re.search(WRONG_LATE[name], report) and "wrong" in report


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass(name: str, seed: int) -> None:
    report, data = run(name, seed)
    assert report == ""
    assert torch.equal(data[2048 : 2048 + 256], torch.arange(256, dtype=torch.float32).flip(0))
