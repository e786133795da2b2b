"""What is written down must let nobody in: values under the name of a secret, and values that look like one."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
# The last words of a name. A plural of "token" is a number of tokens.
SECRET = (
    *("password", "passwords", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "token"),
    *("apikey", "api key", "api keys", "access key", "secret key", "private key", "auth key", "authorization"),
    *("secret access key", "access key id"),
)
# Words before "token" with which it is one of a vocabulary's or of a text's.
OF_A_VOCABULARY = (
    *("bos", "eos", "pad", "unk", "sep", "cls", "mask", "eot", "prefix", "special", "image", "audio"),
    *("per", "next", "last", "first", "new", "a", "each", "begin", "start", "end"),
)
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
VALUES = re.compile(
    "|".join(
        [
            r"(?<![A-Za-z0-9])(?:hf_|api_org_)[A-Za-z0-9]{10,}",  # Hugging Face
            r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{10,}",  # OpenAI, Anthropic and others
            r"(?<![A-Za-z0-9])(?:gh[opusr]_|github_pat_|glpat-)[A-Za-z0-9_-]{10,}",  # GitHub, GitLab
            r"(?<![A-Za-z0-9])xox[a-z]-[A-Za-z0-9-]{10,}",  # Slack
            r"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{30,}",  # Google
            r"(?<![A-Z0-9])A[A-Z]{3}[A-Z0-9]{16}(?![A-Za-z0-9])",  # AWS: AKIA, ASIA, ...
            r"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*",  # JSON web tokens
            r"(?i:(?<![a-z])bearer\s+)[^\s,;\"']{6,}",  # an HTTP header
            r"(?<=://)[^\s/@]+:[^\s/@]+(?=@)",  # user:password in an address
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        ]
    ),
    re.DOTALL,
)
ASSIGNED = re.compile(r"(?<![\w-])([\w-]+)(\s*=\s*)([^\s,;&]+)")  # NAME=VALUE within a text


def names_a_secret(name: str) -> bool:
    """Whether a field of this name holds a secret: `hub_token`, `apiKey`, `AWS_SECRET_ACCESS_KEY`; not `pad_token`."""
    words = [word.lower() for word in WORDS.findall(name)]
    if words[-1:] == ["token"] and words[-2:-1] and words[-2] in OF_A_VOCABULARY:
        return False
    return any(words[-len(last.split()) :] == last.split() for last in SECRET)


def masked(value: Any, name: str = "") -> Any:
    """`value` with *** for every secret in it; mappings, lists and tuples are looked through.

    Args:
        value: anything. What is neither of those nor a text is handed back as it is.
        name: of the field that holds it. Whatever a secret's field holds is masked, but for None, booleans and floats.
    """
    if value is None or isinstance(value, bool | float):
        return value
    if names_a_secret(name):
        return MASK
    if isinstance(value, Mapping):
        return {key: masked(inner, str(key)) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(masked(inner) for inner in value)
    if not isinstance(value, str):
        return value

    def of_field(found: re.Match) -> str:
        return f"{found[1]}{found[2]}{MASK}" if names_a_secret(found[1]) else found[0]

    return ASSIGNED.sub(of_field, VALUES.sub(MASK, value))
