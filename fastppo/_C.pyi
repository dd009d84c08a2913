"""Import torch first: the module links against its libraries."""

from typing import TypedDict

class Built(TypedDict):
    torch: str
    compiler: str
    cuda_archs: tuple[str, ...]
    simd: tuple[str, ...]
    simd_used: str

def built() -> Built: ...
def set_simd(level: str) -> None: ...
