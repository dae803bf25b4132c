"""Attention for Hopper is made of Hopper's instructions: the object files of the last build, disassembled."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.house import kernel_table, sass

# As cuobjdump prints: a loop that waits for an mbarrier off its way, at 0xb0, and shuffles again at 0xe0 if its warp has diverged.
RECORDED = """
		Function : _ZN10tilestream4cuda12_GLOBAL__N_113attend_kernelEi
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                  /* 0x00000a00ff017b82 */
                                                                                           /* 0x000fe20000000800 */
        /*0010*/               @P0 EXIT ;                                                  /* 0x000000000000094d */
                                                                                           /* 0x000fea0003800000 */
        /*0020*/                   UTMALDG.2D [UR8], [UR4] ;                               /* 0x00000008040075b4 */
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8+0x10018], R0 ;  /* 0x01001800ff0075a7 */
        /*0040*/              @!P0 BRA 0xb0 ;                                              /* 0x0000000c00c08947 */
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;    /* 0x00e00000081879f0 */
        /*0060*/                   MUFU.EX2 R4, R4 ;                                       /* 0x0000000400047308 */
        /*0070*/                   BRA.DIV UR5, 0xe0 ;                                     /* 0x000000ee05547947 */
        /*0080*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;                       /* 0x0c201f0004057f89 */
        /*0090*/               @P1 BRA P2, 0x20 ;                                          /* 0x0000001400681947 */
        /*00a0*/                   EXIT ;                                                  /* 0x000000000000794d */
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8+0x10018], R0 ;  /* 0x01001800ff0075a7 */
        /*00c0*/              @!P0 BRA 0xb0 ;                                              /* 0xfffffffc00f49947 */
        /*00d0*/                   BRA 0x50 ;                                              /* 0xffffff10005c7947 */
        /*00e0*/                   WARPSYNC.COLLECTIVE R38, 0x110 ;                        /* 0x0000000026087348 */
        /*00f0*/                   SHFL.BFLY P2, R178, R177, R176, R39 ;                   /* 0x0c0000b0b1b27389 */
        /*0100*/                   ENDCOLLECTIVE ;                                         /* 0x000000000000791b */
        /*0110*/                   BRA 0x90 ;                                              /* 0xffffff10005c7947 */
        /*0120*/                   BRA 0x120;                                              /* 0xfffffffc00fc7947 */
"""


def faults(opcodes: Counter[str]) -> list[str]:
    """What a kernel that keeps Hopper's tensor cores fed has not, or has."""
    missing = [] if opcodes["HGMMA"] or opcodes["QGMMA"] else ["no wgmma"]
    missing += [] if opcodes["UTMALDG"] else ["no load by TMA"]
    return missing + [f"{opcodes[name]} {name}" for name in ("HMMA", "LDL", "STL") if opcodes[name]]


def test_recorded_instructions() -> None:
    (code,) = sass.parse(RECORDED).values()
    assert list(sass.parse(RECORDED)) == ["attend_kernel"]
    assert code[9] == sass.Instruction(0x90, "@P1", "BRA", "", "P2, 0x20")
    assert code[6] == sass.Instruction(0x60, None, "MUFU", ".EX2", "R4, R4")
    assert len(code) == 19 and faults(sass.opcodes(code)) == []


def test_recorded_loops() -> None:
    (code,) = sass.parse(RECORDED).values()
    assert sass.loops(code) == {0x20: {*range(0x20, 0xA0, 0x10), 0xB0, 0xC0, 0xD0}, 0xB0: {0xB0, 0xC0}}
    kernel, loop = sass.describe(code).splitlines()
    assert kernel.startswith("19 instructions: BRA 7, EXIT 2, SYNCS 2, SHFL 2, ")
    assert loop == "  0x0020..0x00d0, 9 instructions: BRA 4, UTMALDG 1, SYNCS 1, HGMMA 1, MUFU 1, SHFL 1"


def test_faults_are_told() -> None:
    assert faults(Counter(HMMA=8, LDL=2, STL=1)) == ["no wgmma", "no load by TMA", "8 HMMA", "2 LDL", "1 STL"]
    assert faults(Counter(QGMMA=1, UTMALDG=1)) == []


def test_attention_for_hopper() -> None:
    if sass.disassembler() is None:
        pytest.skip("no disassembler: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    objects = [path for file, path in kernel_table.objects().items() if file.startswith("attention_sm90")]
    kernels = [named for path in objects for named in sass.disassemble(path).items()]
    if not kernels:
        pytest.skip("no build in this checkout has attention kernels for sm_90a alone")
    assert [] == [(name, told) for name, code in kernels if (told := faults(sass.opcodes(code)))]
