"""The wordings of the demo's support tickets: which sentences mean which value.

`tickets` builds a ticket from these pools and `evaluate` reports on both sides of the split: `TRAIN` wordings are
seen in training, `HELD_OUT` wordings never are, although every word of theirs occurs in training somewhere.

A wording is a sentence with alternatives in square brackets, `[soon|today]`, and slots in braces, `{product}`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

PRODUCT_PHRASES: Mapping[str, tuple[str, ...]] = {
    "inference-api": ("the inference API", "the chat endpoint"),
    "batch-jobs": ("the batch service", "our batch jobs"),
    "gpu-cluster": ("the GPU cluster", "our GPU nodes"),
    "vector-store": ("the vector store", "the embedding index"),
    "fine-tuning": ("the fine-tuning service", "our training runs"),
}
"""Value of the answer's `product`, and how a ticket names it."""

REGIONS: tuple[str, ...] = ("eu-west", "eu-north", "us-east", "us-west", "ap-south", "ap-east")
CURRENCIES: tuple[str, ...] = ("EUR", "USD", "GBP", "CNY", "JPY")
TENANTS: tuple[str, ...] = ("north", "south", "east", "harbor")
TIERS: tuple[str, ...] = ("free", "silver", "gold", "platinum")
MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

COMPANY_FIRST: tuple[str, ...] = (
    "Amber", "Arctic", "Atlas", "Beacon", "Birch", "Bright", "Cedar", "Clear", "Cobalt", "Coral", "Crystal", "Delta",
    "Eagle", "Ember", "Falcon", "Fern", "Granite", "Green", "Harbor", "Hazel", "Indigo", "Iron", "Jade", "Juniper",
    "Lake", "Linden", "Lunar", "Maple", "Marble", "Meadow", "North", "Oak", "Ocean", "Onyx", "Pine", "Polar", "Quartz",
    "Raven", "Red", "River", "Ruby", "Sage", "Silver", "Solar", "Stone", "Summit", "Tidal", "Willow",
)  # fmt: skip
COMPANY_SECOND: tuple[str, ...] = (
    "Bank", "Bridge", "Capital", "Care", "Craft", "Energy", "Farms", "Field", "Foods", "Freight", "Games", "Gate",
    "Health", "Hotels", "House", "Insurance", "Labs", "Legal", "Lines", "Logistics", "Market", "Media", "Mills",
    "Mobility", "Motors", "Optics", "Paper", "Peak", "Pharma", "Point", "Power", "Press", "Rail", "Retail", "Robotics",
    "School", "Steel", "Studio", "Textiles", "Travel",
)  # fmt: skip
COMPANY_FORM: tuple[str, ...] = ("AG", "BV", "Co", "GmbH", "Group", "Inc", "Ltd", "Oy", "SA", "SAS")


# What decides a value, as `drills` scatters it among fillers; never a whole sentence.
CATEGORY_PHRASES: Mapping[str, tuple[str, ...]] = {
    "billing": ("invoice", "the bill", "charged twice", "was charged", "billing mistake", "charges", "finance"),
    "outage": ("is down", "went down", "offline", "unavailable", "cannot reach", "outage", "stopped working"),
    "performance": ("slow", "latency", "delays", "time out", "the speed", "throughput", "more than a minute"),
    "access": ("log in", "password", "key rejected", "locked out", "permission", "access", "login page"),
    "quota": ("rate limit", "quota", "too many requests", "error 429", "daily limit", "used up", "too few tokens"),
    "quality": ("wrong answers", "invalid JSON", "nonsense", "invents facts", "got worse", "results", "accuracy"),
}
PRIORITY_PHRASES: Mapping[str, tuple[str, ...]] = {
    "urgent": (
        "emergency",
        "critical",
        "immediately",
        "production stopped",
        "lose money",
        "all customers",
        "right now",
    ),
    "high": ("most users", "important", "big launch", "several teams", "main business", "at risk", "matters a lot"),
    "normal": ("some users", "a few people", "workaround", "now and then", "one team", "effect limited", "annoying"),
    "low": ("no hurry", "no rush", "can wait", "minor point", "when you find time", "not bother", "not pressing"),
}
REFUND_PHRASES: Mapping[bool, tuple[str, ...]] = {
    True: ("refund us", "a refund", "money back", "pay us back", "the difference", "send the money"),
    False: ("look into", "check it", "explain", "what happened", "investigate", "fix this", "advice", "call us"),
}
MONEY_PHRASES: tuple[str, ...] = ("about", "the sum is", "we paid", "amount:", "so far", "it cost", "lost")
FILLERS: tuple[str, ...] = (
    "the",
    "we",
    "our",
    "this",
    "is",
    "for",
    "it",
    "please",
    "and",
    "on",
    "to",
    "of",
    "today",
    ",",
)


@dataclass(frozen=True, slots=True)
class Wordings:
    """One side of the split.

    `problem` is keyed by category, `impact` by priority, `ask` by whether a refund is requested.
    """

    greeting: tuple[str, ...]
    problem: Mapping[str, tuple[str, ...]]
    impact: Mapping[str, tuple[str, ...]]
    regions: tuple[str, ...]
    money: tuple[str, ...]
    due_date: tuple[str, ...]
    ask: Mapping[bool, tuple[str, ...]]
    aside: tuple[str, ...]
    closing: tuple[str, ...]

    def all(self) -> tuple[str, ...]:
        """Every wording of this side, greetings and closings included."""
        keyed = (*self.problem.values(), *self.impact.values(), *self.ask.values())
        flat = (self.greeting, self.regions, self.money, self.due_date, self.aside, self.closing)
        return tuple(wording for pool in (*keyed, *flat) for wording in pool)


TRAIN = Wordings(
    greeting=(
        "[Hello|Hi|Dear] [team|support|all],",
        "Good [morning|afternoon|evening][|, support|, team].",
        "[Hello|Hi] there,",
        "[Support|Team],",
        "",
    ),
    problem={
        "billing": (
            "The [latest|last|new] invoice for {product} [is wrong|looks wrong|does not add up].",
            "We [were|have been] charged twice for {product} [this|last] month.",
            "There is a [mistake|billing mistake] in [our|the] bill for {product}.",
            "[Our|The] bill for {product} [lists|shows] [usage|hours] we never had.",
            "The price [charged|billed] for {product} is not the price [in our contract|we agreed on].",
            "[Finance|Our finance team] [does not understand|cannot match] the [charges|invoice] for {product}.",
            "A discount [is|was] missing [on|from] the invoice for {product}.",
        ),
        "outage": (
            "{product} [is|has been] down [since|from] [this morning|last night|noon].",
            "{product} [stopped working|went down] [an hour ago|today|last night].",
            "We [cannot reach|can no longer reach] {product} at all.",
            "{product} [answers|responds] to every [request|call] with error 503.",
            "{product} [is|has been] completely unavailable [today|for us|since noon].",
            "There [is|seems to be] an outage of {product}.",
            "Nothing [works|runs] on {product}, it is offline.",
        ),
        "performance": (
            "{product} [is|has become|got] very slow [today|this week|since the update].",
            "The latency of {product} [has doubled|went up|is far too high].",
            "[Requests|Calls] to {product} [take|need] [far too long|more than a minute].",
            "{product} [runs|works] at half the [usual|normal] speed.",
            "The throughput of {product} [dropped|fell] [today|last night|after the update].",
            "We see [long|growing] delays [on|with] {product}.",
            "[Many|Some] [requests|calls] to {product} time out because it is too slow.",
        ),
        "access": (
            "[Two of us|Some users|New users] cannot log in to {product}.",
            "[Our|The] API key for {product} [is rejected|no longer works|has expired].",
            "We [are|were] locked out of {product}.",
            "[I|We] [have|got] no permission to [open|use] {product}.",
            "The password [reset|change] for {product} [fails|never arrives].",
            "The [single sign-on|login page] of {product} [fails|refuses us].",
            "Please [check|restore] our access rights [on|for] {product}.",
            "[Since today|Since yesterday|Today] [our|the] key is rejected by {product}.",
            "[Yesterday|Last night|Today] {product} [refused|rejected] [our|my] key, nobody has access.",
            "We have no access to {product} [any more|since this morning].",
        ),
        "quota": (
            "We [hit|reached] the rate limit of {product} [again|every day|today].",
            "[Our|My|The] quota for {product} is [too small|used up].",
            "We need a higher [limit|quota] [for|on] {product}.",
            "{product} [rejects|refuses] us with error 429, too many requests.",
            "Please [raise|increase] our limit [on|for] {product}.",
            "The [daily|monthly] quota of {product} [runs out|is gone] by noon.",
            "[Our plan gives|We get] too few [requests|tokens] on {product}.",
        ),
        "quality": (
            "The [answers|outputs] [of|from] {product} are [wrong|worse than before|often empty].",
            "{product} [returns|gives] [broken|invalid] JSON.",
            "The [results|outputs] of {product} [got worse|changed] [after the update|last week].",
            "{product} [makes up|invents] [facts|things] in its answers.",
            "{product} [mixes|confuses] languages in its [answers|results].",
            "The accuracy of {product} [dropped|fell] [this week|after the update].",
            "We [find|see] nonsense in the [text|answers] [from|of] {product}.",
        ),
    },
    impact={
        "urgent": (
            "[Our|The] production is [blocked|stopped].",
            "[All|All of] our customers are affected right now.",
            "This is [critical|an emergency], we [are losing|lose] money every hour.",
            "This is urgent, [please act now|we cannot work].",
            "[Nobody|No one] here can work.",
            "We must have [help|a fix] immediately.",
        ),
        "high": (
            "[Many|Most] of our users [notice it|are affected].",
            "[An important|A big] launch [depends on it|is at risk].",
            "[Several|Three] teams [wait|are waiting] for [a fix|this].",
            "This [matters a lot|is important] [to|for] us.",
            "Our [managers|directors] ask about it every day.",
            "It [slows down|hurts] our main business.",
        ),
        "normal": (
            "[A few|Some] [users|people] [notice it|are affected].",
            "We [have|found] a workaround [for now|for the moment].",
            "It is [annoying|a nuisance] but we can [work|live with it].",
            "[Only|Just] one team is affected.",
            "It happens [from time to time|now and then].",
            "The effect on our work is [small|limited].",
        ),
        "low": (
            "There is no [hurry|rush].",
            "[Whenever|When] you [have|find] time is fine.",
            "It is [only|just] a minor [detail|point].",
            "It does not [disturb|bother] anyone.",
            "This [can|may] wait.",
            "It is not pressing [at all|for us].",
        ),
    },
    regions=(
        "[It happens|This happens|We see it] in {regions}.",
        "[Affected regions|Regions]: {regions}.",
        "[Our|The] workloads run in {regions}.",
        "[It|This] concerns {regions}.",
        "[Please look|Have a look] at {regions}.",
    ),
    money=(
        "[The amount|The sum] [in question|concerned] is {money}.",
        "[It|This] [cost|has cost] us {money}[| so far].",
        "We [are talking|speak] about {money}.",
        "[Amount|Sum]: {money}.",
        "We [paid|were charged|lost] {money}.",
        "[In total|Altogether|Up to now] [it took|this is|we lost] {money}.",
    ),
    due_date=(
        "[Please answer|Please reply|We need an answer] by {due_date}.",
        "[Our|The] deadline is {due_date}.",
        "It [has to|must] be [solved|fixed|done] by {due_date}.",
        "[Due|Deadline]: {due_date}.",
        "We [expect|hope for] a solution [before|by] {due_date}.",
    ),
    ask={
        True: (
            "[Please|Kindly] refund [us|the money|the difference].",
            "We [want|would like|ask for] a refund.",
            "[Please|Kindly] [send|pay] the money back.",
            "We [expect|want] our money back.",
            "[Can|Could] you [refund this|pay us back]?",
        ),
        False: (
            "[Please|Kindly] [fix this|look into it|investigate].",
            "[Can|Could] you [help|check|explain this]?",
            "[Tell us|Let us know] what [happened|to do][|, we do not want a refund].",
            "We [need|would like] [an explanation|your advice].",
            "[Please|Kindly] [call|write to] [me|us][|, a refund is not needed].",
        ),
    },
    aside=(
        "[We run|There are] {number} [jobs|requests] [a day|an hour] [on it|here].",
        "[Our|The] [reference|case number] is {number}.",
        "We are [customers|users] since {year}.",
        "[I|We] wrote about [it|this] in {year} [already|before].",
        "[About|More than] {number} people [use|work with] it.",
        "[Some|Around|Over] {number} [colleagues|engineers|users] depend on it.",
        "{number} [accounts|seats|users] are [active|registered] [on it|here].",
        "We [serve|have] {number} [customers|readers|clients] [a week|on this plan].",
        "", "", "", "", "",
    ),
    closing=("[Thanks|Thank you][|!|.]", "[Best|Kind] regards", "[Cheers|Regards]", "Thanks in advance.", ""),
)  # fmt: skip

HELD_OUT = Wordings(
    greeting=("Hello and good morning,", "Dear support team,", "Hi team, good evening."),
    problem={
        "billing": (
            "Finance has found a mistake in the last invoice, it is about {product}.",
            "Last month {product} was charged to us twice.",
            "We do not understand the latest bill we got for {product}.",
        ),
        "outage": (
            "Since last night {product} is offline and we cannot reach it.",
            "Today {product} went down again, every call fails.",
            "For an hour now {product} has been unavailable.",
        ),
        "performance": (
            "Since the update every call to {product} is slow.",
            "We have to wait more than a minute, the latency of {product} is too high.",
            "The speed of {product} dropped, we see delays.",
        ),
        "access": (
            "I cannot log in, {product} refuses my password.",
            "This morning our key was rejected, we have no access to {product}.",
            "New users get no permission for {product}.",
        ),
        "quota": (
            "Error 429 again: the rate limit on {product} is too small for us.",
            "Could you raise the quota we have on {product}?",
            "By noon we have used up our daily limit for {product}.",
        ),
        "quality": (
            "After the update the answers from {product} got worse.",
            "We often see invalid JSON in the results of {product}.",
            "Some answers of {product} are nonsense, it invents things.",
        ),
    },
    impact={
        "urgent": (
            "Please act immediately, production is stopped.",
            "It is an emergency for all of our customers.",
            "We lose money right now, this is critical.",
        ),
        "high": (
            "Most users are affected and several teams are waiting.",
            "It is important, a big launch depends on this.",
            "Our main business is at risk.",
        ),
        "normal": (
            "Some of us notice it now and then.",
            "For the moment there is a workaround.",
            "Just a few people are affected, the effect is limited.",
        ),
        "low": (
            "It can wait, there is no rush at all.",
            "A minor point, look at it when you find time.",
            "This is not pressing and does not bother us.",
        ),
    },
    regions=("We notice this in {regions}.", "The regions concerned are {regions}.", "It is about {regions} only."),
    money=("So far we paid {money} for this.", "The sum is {money}.", "It is about {money}."),
    due_date=(
        "A solution is due by {due_date}.",
        "We hope for an answer before {due_date}.",
        "Please have it fixed by {due_date}.",
    ),
    ask={
        True: ("Could you send us a refund?", "Please pay us the difference back.", "We would like our money back."),
        False: ("Could you look into this?", "Please explain what happened.", "We would like you to check it."),
    },
    aside=(
        "We have {number} users on it.", "I wrote to you in {year}.", "The case number of this is {number}.",
        "", "",
    ),
    closing=("Many thanks and best regards", "Thank you in advance.", "Kind regards, and thanks."),
)  # fmt: skip
