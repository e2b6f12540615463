"""The closed vocabulary of words after a number: units that keep its value, and words that change it."""

from __future__ import annotations

UNIT_LETTERS = "mgshlLJNW"
"""Single letters that are units in roman type."""
LETTERS_OF_GOLD_UNITS = "KCFVAT"
"""Further single letters that only a gold answer uses as a unit; in an answer they may be a factor."""

SAME_UNIT = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "inche": "in", "inch": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "mile": "mi", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "day": "day", "gram": "g",
    "gm": "g", "kilogram": "kg", "milligram": "mg", "pound": "lb", "ounce": "oz", "liter": "l", "litre": "l",
    "milliliter": "ml", "degree": "deg", "cent": "cent", "dollar": "usd", "buck": "usd", "euro": "eur", "mph": "mi/h",
    "kph": "km/h", "kmph": "km/h", "joule": "j", "newton": "n", "watt": "w", "sq": "square", "percent": "percent",
    "radian": "rad", "rupee": "inr", "lbs": "lb", "yen": "jpy", "ohm": "ohm", "am": "am", "pm": "pm",
}  # fmt: skip
PHYSICAL_UNITS = frozenset(SAME_UNIT.values()) | {
    "square", "cubic", "2", "3", "mm", "cm", "km", "kg", "mg", "ml", "hz",
}  # fmt: skip
_FURTHER_UNITS = (
    "dl cl kl um nm pm dm hm ton tonne t gallon gal quart qt pint pt cup teaspoon tsp tablespoon tbsp acre hectare "
    "ha week month year yr decade century millisecond ms kw kwh kj mj gj cal kcal calorie volt v amp ampere ohm mol "
    "mole kelvin celsius fahrenheit pa kpa hz khz mhz ghz hertz bit byte kb mb gb knot rpm db decibel coulomb tesla "
    "farad rev revolution usd eur gbp inr jpy cny rmb yuan rs peso franc ruble rouble won penny pence nickel dime "
    "coin unit sq rad deg sr lightyear au furlong fathom carat stone bushel barrel point pts pixel"
)
_COUNTED = (
    "way number element solution root zero digit integer value triple pair tuple triplet quadruple outcome case "
    "pattern possibility combination permutation arrangement choice option selection subset set function path route "
    "walk step move term factor divisor multiple prime square cube triangle rectangle circle polygon pentagon "
    "hexagon quadrilateral parallelogram rhombus trapezoid side edge face vertex vertice diagonal angle line "
    "segment chord plane region piece part interval row column cell tile block box boxe brick ball marble bead card "
    "die dice chip token stick rod chair table seat desk door window room house building floor storey story stair "
    "apple orange banana pear peach plum lemon melon watermelon cherry berry grape strawberry mango egg cake cookie "
    "pie pizza slice candy sweet chocolate sandwich bread loaf bottle glass glas can jar bag basket carton crate "
    "packet pack bundle container bucket tank book page notebook pencil pen crayon marker eraser ruler sheet paper "
    "letter word stamp envelope ticket photo picture toy doll kite balloon game match puzzle coin bill note child "
    "children student pupil teacher boy girl man men woman women person people adult player team member friend "
    "worker employee customer passenger guest farmer sheep cow goat horse pig chicken hen duck rabbit dog cat mouse "
    "mice bird fish fishe frog bee ant insect spider animal pet tree flower rose plant leaf leaves seed garden car "
    "truck bus train bike bicycle boat ship wheel tire trip lap mile race shirt sock shoe hat dress button bracelet "
    "necklace ring kilowatt meal recipe serving spoon plate day night class grade group question problem test exam "
    "answer vote year song video message email hour lesson session shelf shelve drawer bulb lamp light battery "
    "computer phone machine toothpick share item object thing gift present prize medal trophy point goal run score "
    "time turn trial toss roll throw flip graph matrix matrice polynomial equation sequence string code password "
    "subgroup oclock"
)
_ATTRIBUTES = (
    "of in the a an per each every all total different distinct possible such altogether left "
    "remaining long wide tall high deep old away apart ago later younger older red blue green yellow white black "
    "brown small large big real whole natural complex ordered unordered integral rational lattice for from on at "
    "with this that these there they it he she her his their kind type pair distance length area "
    "volume speed weight height age perimeter available required needed exactly"
)
KNOWN_WORDS = frozenset(f"{_FURTHER_UNITS} {_COUNTED} {_ATTRIBUTES}".split()) | PHYSICAL_UNITS | set(SAME_UNIT)

_COMPARISONS = (
    "or and not no never none maybe perhaps possibly either neither if then but except unless is are was equals "
    "approximately approx about around least most than more less greater fewer between to half almost nearly roughly "
    "above below under up down"
)
_OPERATIONS = (
    "squared cubed times plus minus over divided multiplied factorial choose pi sqrt root mod modulo remainder log "
    "tens doubled tripled halved ln sin cos tan power raised infinity infinite negative positive double twice "
    "inverse reciprocal"
)
_DENIALS = (
    "wrong incorrect false guess guessed guessing untrue invalid impossible mistaken error ish so cannot isnt nope "
    "unlikely unsure"
)
CHANGING_WORDS = frozenset(f"{_COMPARISONS} {_OPERATIONS} {_DENIALS}".split()) - {"positive"}
"""Words after a number that make it another value, or no value."""
