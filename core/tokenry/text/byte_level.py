"""Byte-level BPE's alphabet: which bytes the characters of a token stand for.

In: a token as the vocabulary spells it. Out: its bytes. Knows no tokenizer.
"""

from __future__ import annotations


def byte_level_bytes(token: str) -> bytes:
    """Bytes that a byte-level token stands for; a token that holds any other character stands for
    its own text.
    """
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted. Source: openai/gpt-2, encoder.py,
    bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


_BYTE_OF = _byte_alphabet()
