"""What must not be recorded: passwords, tokens and keys are blotted out before anything is written."""

import re

HIDDEN = "***"
# Words of a name that say that its value is secret; `max_tokens` and `tokenizer` are other words.
SECRET_WORDS = {"password", "passwd", "pwd", "secret", "token", "credential", "credentials", "apikey", "authorization"}
SECRET_PAIRS = {("api", "key"), ("access", "key"), ("secret", "key"), ("private", "key"), ("account", "key")}
SECRET_LAST = "key"  # alone at the end, as of wandb_key
COUNTING = {"count", "length", "limit", "max", "min", "num", "number", "per", "size"}  # beside `token`: no secret
SCHEME = r"(\b[a-z][a-z0-9+.-]*://)"
NOTHING = re.compile(r"|none|null|true|false", re.IGNORECASE)
NUMBER = re.compile(r"[-+.\d]+(e[-+]?\d+)?", re.IGNORECASE)
PATTERNS = tuple(
    (re.compile(pattern, flags), replacement)
    for pattern, flags, replacement in (
        # user:password@ of an address, to the last @: a password may hold `/` and `@`, and a host that is hidden with
        # it does less harm than half a password that is not.
        (rf"{SCHEME}[^\s:'\"]*:(?!//)(?:(?!://)[^\s'\"])*@", re.IGNORECASE, rf"\1{HIDDEN}@"),
        (rf"{SCHEME}[^/\s@'\"]+@", re.IGNORECASE, rf"\1{HIDDEN}@"),  # a token alone
        (
            r"([?&;](?:[a-z0-9_-]*(?:token|signature|secret|password|passwd|pwd|credential|key|keyid)|sig|auth)=)[^&\s'\"#]+",
            re.IGNORECASE,
            rf"\1{HIDDEN}",
        ),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", 0, HIDDEN),  # AWS
        (r"\bhf_[A-Za-z0-9]{20,}\b", 0, HIDDEN),  # Hugging Face
        (r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,})", 0, HIDDEN),
        (r"\bsk-[A-Za-z0-9_-]{20,}", 0, HIDDEN),
        (r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}", 0, HIDDEN),  # JSON web tokens
        (r"\b((?:bearer|basic)\s+)[A-Za-z0-9+/=._-]{16,}", re.IGNORECASE, rf"\1{HIDDEN}"),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL, HIDDEN),
    )
)


def redact(text: str) -> str:
    """`text` without what looks like a credential: of addresses, of their queries, and tokens of known forms."""
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_value(name: str, value: str) -> str:
    """The value of a parameter or tag; all of it is hidden where the name says that it is secret."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name.rpartition(".")[2]).lower())
    pairs = set(zip(words, words[1:], strict=False))
    secret = SECRET_WORDS & set(words)
    if not (secret or SECRET_PAIRS & pairs or words[-1:] == [SECRET_LAST]) or NOTHING.fullmatch(value):
        return redact(value)
    counts = secret == {"token"} and COUNTING & set(words) and NUMBER.fullmatch(value)  # a PIN is a number, too
    return value if counts else HIDDEN


def redact_values(values: dict[str, str]) -> dict[str, str]:
    """The same of many."""
    return {name: redact_value(name, value) for name, value in values.items()}
