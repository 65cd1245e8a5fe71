"""A JSON Schema taken apart and put together again, so that a grammar can enforce it; see `json_grammar.py`.

references.py   which draft a schema is of, and what a reference in it names
negation.py     what must hold where another schema must not
choices.py      in-place keywords (allOf, anyOf, oneOf, not, if, $ref ...) become alternatives of plain keywords
values.py       plain keywords of one alternative become one form for each type of value;
                numeric.py and objects.py do so for numbers and objects
patterns.py     regular expressions and formats, in the spelling that llguidance knows
spelling.py     which of the values that a schema lists can be spelled
forms.py        all forms of a document, made when they are asked for
document.py     forms become a schema without in-place keywords, and a list of what it leaves to validation
"""
