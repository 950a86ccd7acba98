"""What gives access to something is used, and neither written nor printed: passwords, tokens and signatures of URLs."""

import re
from typing import Any

MASK = "***"

USER = re.compile(r"(?<=://)[^\s'\"<>/?#:]*:[^\s'\"<>/?#]*@|(?:(?<=\bhttp://)|(?<=\bhttps://))[^\s'\"<>/?#:]+@")
"""``user:password@``, and a token in its place; before the @ of abfs:// stands the name of a container."""
TELLING = (
    r"(?:[\w.%-]{0,40}(?:token|secret|passw|pwd|signature|credential|api[_-]?key|access[_-]?key|accessid|jwt)[\w.%-]{0,40}"
    r"|(?:[\w.%-]{0,40}[_-])?auth(?:orization)?|sig|key-pair-id)"
)
"""Names of a URL's parameters whose values give access."""
PARAMETER = re.compile(
    r"([?&;](?i:" + TELLING + r"|key|pass|policy)=)[^\s&'\"<>#]*[^\s&'\"<>#.,;:)\]]",
)
SIGNED = re.compile(r"(?i)x-(?:amz|goog|oss|cos)-.*|" + TELLING)
"""Parameters that change when a URL is signed anew, and the file does not."""
WITH_SIGNATURE = {"sv", "ss", "srt", "st", "se", "sr", "sp", "spr", "sip", "expires", "algorithm", "skoid", "sktid"}
WITH_SIGNATURE |= {"skt", "ske", "sks", "skv", "policy"}
"""The same under the names of Azure, CloudFront and older signatures; without one they may mean something else."""

HF_TOKEN = re.compile(r"\bhf_(?:(?=[A-Za-z]*[0-9A-Z])[A-Za-z0-9]{8,}|[A-Za-z0-9]{20,})")
HEADER = re.compile(r"(?i)(\b(?:bearer|authorization['\"]?\s*[:=]\s*['\"]?(?:basic|token))\s+)[\w.~+/=-]{8,}")
ASSIGNED = re.compile(
    r"(?i)(\b[\w-]{0,40}(?:passwd|password|secret|api[_-]?key|access[_-]?key|(?:access|auth|session|security|hf)[_-]?token)"
    r"[\w-]{0,40}['\"]?\s*[=:]\s*['\"]?)(?!None\b|null\b)[^\s'\",;&})\]]+"
)
"""As options of a file system are quoted: ``secret='...'``, ``"api_key": "..."``."""

SECRET_NAME = re.compile(r"(?i)(?:.*[_.-])?(?:token|secret|password|passwd|key|credentials?|signature|sas)")
HARMLESS_NAME = re.compile(
    r"(?i)(?:.*[_.-])?(?:bos|eos|pad|unk|sep|cls|mask|sort|image|text|input|output|column)[_.-].*",
)


def masked(value: Any) -> Any:
    """The same text, or list or mapping of texts, with a mask in place of what gives access to something.

    Masked is what a URL has as ``user:password@`` or as a token or a signature in its query, wherever in a text it
    stands; the tokens of Hugging Face; and texts whose key says that they are secret, such as ``api_key``.
    """
    if isinstance(value, str):
        text = PARAMETER.sub(rf"\1{MASK}", USER.sub(f"{MASK}@", value))
        return HF_TOKEN.sub(MASK, HEADER.sub(rf"\1{MASK}", ASSIGNED.sub(rf"\1{MASK}", text)))
    if isinstance(value, dict):
        return {key: MASK if item and is_secret(key, item) else masked(item) for key, item in value.items()}
    return [masked(item) for item in value] if isinstance(value, list) else value


def is_secret(name: Any, value: Any) -> bool:
    """Whether an option of that name holds what nobody may read."""
    says_so = isinstance(name, str) and SECRET_NAME.fullmatch(name) and not HARMLESS_NAME.fullmatch(name)
    return bool(says_so) and isinstance(value, (str, bytes))


def is_masked(value: Any) -> bool:
    """Whether something in a value was masked before: it cannot be used."""
    if isinstance(value, str):
        return value == MASK or bool(re.search(rf"://\S*{re.escape(MASK)}", value))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(is_masked, parts))


def without_credentials(url: str) -> str:
    """What a URL names, whoever asks for it and until when it may be asked: by this two are compared."""
    address, mark, query = USER.sub("", url).partition("?")
    if "://" not in url or not mark:
        return address + mark + query
    parameters = [(part.partition("=")[0], part) for part in query.split("&")]
    secret = {name for name, _ in parameters if SIGNED.fullmatch(name)}
    if any("sig" in name.lower() for name in secret):
        secret |= {name for name, _ in parameters if name.lower() in WITH_SIGNATURE}
    kept = "&".join(part for name, part in parameters if name not in secret)
    return f"{address}?{kept}" if kept else address
