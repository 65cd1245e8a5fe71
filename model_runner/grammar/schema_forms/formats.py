"""Writes the formats that validation asserts as expressions for llguidance.

Part of `moebeam.model_runner.grammar.schema_forms`, for `values`. Every text of an expression is of its format; where
an expression leaves texts out, `NARROWED` says which.
"""

from moebeam.model_runner.grammar.schema_forms.patterns import CONTROLS

_UNICODE = r"\u{a0}-\u{d7ff}\u{f900}-\u{fdcf}\u{fdf0}-\u{ffef}" + "".join(
    rf"\u{{{plane:x}0000}}-\u{{{plane:x}fffd}}" for plane in range(1, 14)
)
"""Characters that IRIs add to those of URIs (RFC 3987, ucschar), up to plane 13."""

_ESCAPE = "%[0-9a-fA-F]{2}"
_HEX = "[0-9a-fA-F]{1,4}"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"


def _build_ipv6() -> str:
    last = f"(?:{_HEX}:{_HEX}|{_IPV4})"
    return "|".join(
        [
            f"(?:{_HEX}:){{6}}{last}",
            f"::(?:{_HEX}:){{5}}{last}",
            *(f"(?:(?:{_HEX}:){{0,{5 - after - 1}}}{_HEX})?::(?:{_HEX}:){{{after}}}{last}" for after in (4, 3, 2, 1)),
            f"(?:(?:{_HEX}:){{0,4}}{_HEX})?::{last}",
            f"(?:(?:{_HEX}:){{0,5}}{_HEX})?::{_HEX}",
            f"(?:(?:{_HEX}:){{0,6}}{_HEX})?::",
        ]
    )


def _build_uris(more: str, private: str) -> tuple[str, str]:
    """Of RFC 3986 (3987): URIs, and relative references.

    Args:
        more: characters beside those of ASCII.
        private: characters that a query may hold too.
    """
    plain = rf"a-zA-Z0-9\-._~!$&'()*+,;={more}"
    segment_char = f"(?:[{plain}:@]|{_ESCAPE})"
    path = f"(?:/{segment_char}*)*"
    rooted = f"/(?:{segment_char}+{path})?"
    tail = rf"(?:\?(?:[{private}/?]|{segment_char})*)?(?:#(?:{segment_char}|[/?])*)?"
    future = "v[0-9a-fA-F]+[.][a-zA-Z0-9._~!$&'()*+,;=:\\-]+"
    host = rf"(?:\[(?:{_build_ipv6()}|{future})\]|(?:[{plain}]|{_ESCAPE})*)"
    authority = f"(?:(?:[{plain}:]|{_ESCAPE})*@)?{host}(?::[0-9]*)?"
    uri = f"[a-zA-Z][a-zA-Z0-9+.-]*:(?://{authority}{path}|{rooted}|{segment_char}+{path}|){tail}"
    relative = f"(?://{authority}{path}|{rooted}|(?:[{plain}@]|{_ESCAPE})+{path}|){tail}"
    return uri, relative


def _build_template() -> str:
    """Of RFC 6570."""
    name_char = f"(?:[a-zA-Z0-9_]|{_ESCAPE})"
    name = rf"{name_char}(?:\.?{name_char})*(?::[1-9][0-9]{{0,3}}|\*)?"
    literal = rf"[a-zA-Z0-9!#$&'()*+,./:;=?@\[\]_~{_UNICODE}-]"
    return rf"(?:{literal}|{_ESCAPE}|\{{[+#./;?&=,!@]?{name}(?:,{name})*\}})*"


def _build_formats() -> dict[str, tuple[str, ...]]:
    year = "[0-9]{4}"
    leap = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
    date = (
        f"(?:{year}-(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|{year}-(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
        f"|{year}-02-(?:0[1-9]|1[0-9]|2[0-8])|{leap}-02-29)"
    )
    clock = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
    fraction = r"(?:\.[0-9]{1,9})?"
    time = rf"(?:{clock}:[0-5][0-9]{fraction}(?:[Zz]|[+-]{clock})|23:59:60{fraction}[Zz])"
    # Never hyphens as third and fourth character: those are for encoded names.
    label = "X(?:X?|YX|YYX|Y(?:XY|-X)Y{0,58}X)".replace("X", "[a-zA-Z0-9]").replace("Y", "[a-zA-Z0-9-]")
    host = rf"{label}(?:\.{label})*"
    # A label of other letters must be short enough in its encoded form: 59 characters, 1 to 4 of each letter.
    scripts = {r"a-z0-9\u{e0}-\u{f6}\u{f8}-\u{ff}": 19, r"0-9\u{3b1}-\u{3c1}\u{3c3}-\u{3c9}\u{430}-\u{44f}": 19}
    scripts[r"0-9\u{4e00}-\u{9fa5}\u{3041}-\u{3096}\u{30a1}-\u{30fa}\u{ac00}-\u{d7a3}"] = 11
    letters = "|".join(f"[{chars}](?:-?[{chars}]){{0,{longest}}}" for chars, longest in scripts.items())
    idn_host = rf"(?:{label}|{letters})(?:\.(?:{label}|{letters})){{0,3}}"
    atom_chars = "a-zA-Z0-9!#$%&'*+/=?^_`{|}~"
    atom = f"[{atom_chars}-]+"
    idn_atom = rf"[{atom_chars}\u{{a0}}-\u{{d7ff}}-]+"
    uri, relative = _build_uris("", "")
    iri, relative_iri = _build_uris(_UNICODE, r"\u{e000}-\u{f8ff}")
    pointer = rf"(?:/(?:[^~/{CONTROLS}]|~[01])*)*"
    count = "[0-9]{1,9}"
    clock_span = f"T(?:{count}H(?:{count}M(?:{count}S)?)?|{count}M(?:{count}S)?|{count}S)"
    day_span = f"(?:{count}Y(?:{count}M(?:{count}D)?)?|{count}M(?:{count}D)?|{count}D)"
    whole = {
        "date": date,
        "time": time,
        "date-time": f"{date}[Tt]{time}",
        "duration": f"P(?:{day_span}(?:{clock_span})?|{clock_span}|{count}W)",
        "ipv4": _IPV4,
        "ipv6": _build_ipv6(),
        "uuid": "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
        "uri": uri,
        "iri": iri,
        "uri-reference": f"{uri}|{relative}",
        "iri-reference": f"{iri}|{relative_iri}",
        "uri-template": _build_template(),
        "json-pointer": pointer,
        "relative-json-pointer": f"(?:0|[1-9][0-9]{{0,8}})(?:#|{pointer})",
    }
    return {name: (f"^(?:{pattern})$",) for name, pattern in whole.items()} | {
        "hostname": (f"^{host}$", "^[a-zA-Z0-9.-]{1,253}$"),
        "idn-hostname": (f"^(?:{host}|{idn_host})$", r"^[\s\S]{1,253}$"),
        "email": (rf"^{atom}(?:\.{atom})*@{host}$", "^[!-?A-~]{1,64}@[a-zA-Z0-9.-]{1,253}$"),
        "idn-email": (
            rf"^{idn_atom}(?:\.{idn_atom})*@(?:{host}|{idn_host})$",
            rf"^(?:[!-?A-~]{{1,64}}|[^@{CONTROLS}]{{1,21}})@[\s\S]{{1,253}}$",
        ),
    }


FORMATS = _build_formats()
"""The expressions that a text of a format must all match. `regex` has none and is left to validation."""

_NO_LEAP = "no leap second but 23:59:60Z, and at most nine digits of a fraction"
_NO_QUOTES = "no quoted mailboxes, and no addresses in brackets"
_SCRIPTS = "names of Latin, Greek, Cyrillic, Chinese, Japanese and Korean letters, of some twelve letters beside ASCII"

NARROWED = {
    "time": _NO_LEAP,
    "date-time": _NO_LEAP,
    "duration": "counts of at most nine digits",
    "relative-json-pointer": "counts of at most nine digits",
    "hostname": "no names in their encoded form (xn--)",
    "idn-hostname": _SCRIPTS,
    "email": _NO_QUOTES,
    "idn-email": f"{_NO_QUOTES}; {_SCRIPTS}",
}
"""What a format's expressions leave out, by format; the others leave out nothing."""
