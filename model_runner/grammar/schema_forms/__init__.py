"""Rewrites a JSON Schema so that llguidance can enforce it; `json_grammar.py` calls it, ADR 0007 says why.

negation.py     the opposite of a schema
choices.py      expands in-place keywords (allOf, anyOf, oneOf, not, if, $ref ...) into alternatives of plain keywords
values.py       builds a form for each type of value that an alternative allows;
                numeric.py and objects.py do so for numbers and objects
patterns.py     translates regular expressions
formats.py      the expressions of formats, and what they leave out
lexer_cost.py   which strings a lexer can follow
literals.py     which of the values that a schema lists llguidance can write, and how
forms.py        builds the forms of a document lazily
document.py     writes forms as a schema, and lists what it leaves to validation
"""
