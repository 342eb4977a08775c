"""Every way of combining, described once: what docs, recipes and reports say about it. Knows no tensor."""

from dataclasses import dataclass

from toolkit.errors import InputError, Problem


@dataclass(frozen=True)
class Method:
    """One way of combining.

    kind: merge | mix | vote | gate | route | bag | boost. formula: plain text, with w for weights and k over the
    members. training: what has to be learnt or searched before. serving: what an answer costs, against one adapter.
    """

    kind: str
    name: str
    says: str
    formula: str
    paper: str
    training: str
    serving: str


FREE = "Nothing beside the members. Weights may be given, or searched on held-out talk: a merge and a pass each try."
FITTED = "Nothing beside the members. Weights may be given, or fitted on held-out talk: a pass a member, one descent."
AS_ONE = "As one adapter"

METHODS: tuple[Method, ...] = (
    Method(
        kind="merge",
        name="exact",
        says="The weighted sum of the updates, with nothing lost: factors stand side by side, so ranks, alphas and "
        "scalings may differ. Also for reft (edits) and embedding (deltas).",
        formula="D = sum_k w_k s_k B_k A_k; s = alpha / rank, or alpha / sqrt(rank)",
        paper="Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089",
        training=FREE,
        serving=f"{AS_ONE} whose rank is the sum of the members' ranks.",
    ),
    Method(
        kind="merge",
        name="svd",
        says="The update of a given rank that lies nearest to the exact sum.",
        formula="D = U_r S_r V_r^T, the r largest singular values of sum_k w_k s_k B_k A_k",
        paper="Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1(3), 1936",
        training=FREE,
        serving=f"{AS_ONE} of the rank asked for (default: the largest of the members').",
    ),
    Method(
        kind="merge",
        name="linear",
        says="A is added to A and B to B, for members of one rank; then each layer is scaled to lie as near to the "
        "exact sum as it can, without which equal members at half a weight each would come out doubled.",
        formula="D = c (sum_k sqrt(w_k s_k) B_k) (sum_k sqrt(w_k s_k) A_k); c = <D', exact> / <D', D'> for D' = D / c",
        paper="Zhang et al., Composing Parameter-Efficient Modules with Arithmetic Operations, arXiv 2306.14870",
        training=FREE,
        serving=f"{AS_ONE} of the members' rank.",
    ),
    Method(
        kind="merge",
        name="ties",
        says="Of each update only the largest numbers stay; for each number the members elect a sign by weight; those "
        "that agree are averaged.",
        formula="D = W sum_k m_k w_k T_k / sum_k m_k |w_k|; T = trimmed update, m = agrees with sign(sum_k w_k T_k), "
        "W = sum_k |w_k|",
        paper="Yadav et al., TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708",
        training=FREE,
        serving=f"{AS_ONE} of the rank asked for (default: the sum of the members').",
    ),
    Method(
        kind="merge",
        name="dare_linear",
        says="Numbers of each update are dropped at random and the others enlarged to match; then the weighted sum.",
        formula="D = sum_k w_k Z_k D_k / density; Z = 1 with probability density, else 0",
        paper="Yu et al., Language Models are Super Mario (DARE), arXiv 2311.03099",
        training=FREE,
        serving=f"{AS_ONE} of the rank asked for (default: the sum of the members').",
    ),
    Method(
        kind="merge",
        name="dare_ties",
        says="Numbers are dropped at random as by dare_linear, then signs are elected as by ties.",
        formula="D = W sum_k m_k w_k T_k / sum_k m_k |w_k|; T_k = Z_k D_k / density, m and W as in ties",
        paper="Yu et al., arXiv 2311.03099; Yadav et al., arXiv 2306.01708",
        training=FREE,
        serving=f"{AS_ONE} of the rank asked for (default: the sum of the members').",
    ),
    Method(
        kind="merge",
        name="magnitude_prune",
        says="Of each update only the largest numbers stay; then the weighted sum.",
        formula="D = sum_k w_k T_k; T = the share density of an update that is largest in magnitude",
        paper="Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626",
        training=FREE,
        serving=f"{AS_ONE} of the rank asked for (default: the sum of the members').",
    ),
    Method(
        kind="mix",
        name="logprob",
        says="At every token the members' log-probabilities are averaged: what one of them excludes is excluded. A "
        "negative weight turns the answer away from a member (arXiv 2105.03023).",
        formula="p(t) ~ prod_k p_k(t)^w_k; sum_k w_k = 1",
        paper="Hinton, Training Products of Experts by Minimizing Contrastive Divergence, Neural Comp. 14(8), 2002",
        training=FITTED,
        serving="One row of the batch for each member: K rows a token, in one forward pass.",
    ),
    Method(
        kind="mix",
        name="prob",
        says="At every token the members' probabilities are averaged: what one of them wants stays possible.",
        formula="p(t) = sum_k w_k p_k(t); w_k >= 0, sum_k w_k = 1",
        paper="Jacobs, Jordan, Nowlan and Hinton, Adaptive Mixtures of Local Experts, Neural Computation 3(1), 1991",
        training=FITTED,
        serving="One row of the batch for each member: K rows a token, in one forward pass.",
    ),
    Method(
        kind="vote",
        name="hard",
        says="Each member votes for the label that it finds likeliest; ties go to the label that stands first.",
        formula="argmax_l sum_k w_k [l = argmax_m p_k(m)]",
        paper="Dietterich, Ensemble Methods in Machine Learning, Multiple Classifier Systems, 2000",
        training=FITTED,
        serving="Each member scores every label: K times one adapter.",
    ),
    Method(
        kind="vote",
        name="soft",
        says="The members' probabilities of each label are averaged.",
        formula="argmax_l sum_k w_k p_k(l)",
        paper="Kittler et al., On Combining Classifiers (sum rule), IEEE PAMI 20(3), 1998",
        training=FITTED,
        serving="Each member scores every label: K times one adapter.",
    ),
    Method(
        kind="vote",
        name="logprob",
        says="The members' log-probabilities of each label are averaged.",
        formula="argmax_l sum_k w_k log p_k(l)",
        paper="Kittler et al., On Combining Classifiers (product rule), IEEE PAMI 20(3), 1998",
        training=FITTED,
        serving="Each member scores every label: K times one adapter.",
    ),
    Method(
        kind="vote",
        name="majority",
        says="Each member answers as a whole; the answer that most give wins, whatever its case, spaces and final "
        "punctuation. Ties go to the answer that stands first.",
        formula="argmax_a sum_k w_k [a = normalised(answer_k)]",
        paper="Wang et al., Self-Consistency Improves Chain of Thought Reasoning in Language Models, arXiv 2203.11171",
        training=FITTED,
        serving="Each member answers: K rows a token, in one batch; nothing can be shown before all have ended.",
    ),
    Method(
        kind="gate",
        name="learned",
        says="A small network reads the stream that enters a layer (per: layer), or what layer 0 gives once for all "
        "(per: model), and weighs the experts' updates for each token, inside the layers, in one pass with a cache.",
        formula="y = W x + sum_k g_k(h) D_k(x); g(h) = softmax(U gelu(V h / rms(h) + b) + c), its top_k made to sum to "
        "1; layer 0 of per: model: g = softmax(learnt numbers)",
        paper="Buehler and Buehler, X-LoRA: Mixture of Low-Rank Adapter Experts, arXiv 2402.07148 (which runs the base "
        "twice, without a cache)",
        training="Forward and backward passes over mixed talk of all experts, base and experts frozen; K + hidden x "
        "(H + K + 1) numbers learn, per: layer for each layer.",
        serving="One row, one pass; every expert's update is computed for every token, whatever top_k.",
    ),
    Method(
        kind="gate",
        name="arrow",
        says="Nothing is learnt: an expert weighs more where what the layer reads lies along the direction that its "
        "update enlarges most. For lora experts.",
        formula="y = W x + sum_k g_k(x) D_k(x); g(x) = softmax(|x . v_k|), v_k: top right singular vector of B_k A_k",
        paper="Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, arXiv 2405.11157",
        training="One pass of one token, and a singular value decomposition for each expert and layer.",
        serving="One row, one pass; every expert's update is computed for every token, whatever top_k.",
    ),
    Method(
        kind="route",
        name="classifier",
        says="Two linear layers read the last user turns: the base's states after a quarter of its layers, pieces of "
        "the words, and how they are typed (length, marks, capitals). One says how likely each expert is, the other "
        "how likely none; both are calibrated, by script and for one turn and several.",
        formula="softmax((W h(x) + U n(x) + b) / T) over the experts, a logistic of such a score for none; h states, "
        "n pieces and signs",
        paper="Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599 (the temperature)",
        training="One pass of a quarter of the base over all user turns, and a few fits of logistic regression.",
        serving="A quarter of the base over at most 64 tokens, then one expert (top_k of them: their mix).",
    ),
    Method(
        kind="route",
        name="centroid",
        says="The expert whose talk lies nearest, by its mean; whether it is anyone's is told as by the classifier.",
        formula="argmin_k |h(x) - mean_k h|, as chances by the distances",
        paper="Chronopoulou et al., AdapterSoup, arXiv 2302.07027 (adapters by nearness of their text)",
        training="One pass of a quarter of the base over all user turns.",
        serving="As the classifier's.",
    ),
    Method(
        kind="route",
        name="embedding",
        says="As the classifier, but what it reads is a sentence encoder of the user's own.",
        formula="softmax((W e(x) + U n(x) + b) / T); e the encoder's sentence embedding",
        paper="Reimers and Gurevych, Sentence-BERT, arXiv 1908.10084",
        training="One pass of the encoder over all user turns, and a few fits of logistic regression.",
        serving="The encoder over the last user turns, then one expert.",
    ),
    Method(
        kind="bag",
        name="bootstrap",
        says="Members of one recipe, each on conversations drawn with replacement; they vote (`vote:` says how). What "
        "a member did not draw judges it: the out-of-bag estimate.",
        formula="vote of m_1 … m_K, m_k learned from n draws of n conversations",
        paper="Breiman, Bagging Predictors, Machine Learning 24, 1996",
        training="K times one adapter's steps, side by side in a stack.",
        serving="K rows of one batch.",
    ),
    Method(
        kind="bag",
        name="seeds",
        says="With `bootstrap: false` members learn everything and differ by their seeds alone.",
        formula="vote of m_1 … m_K, m_k of seed k",
        paper="Lakshminarayanan et al., Simple and Scalable Predictive Uncertainty Estimation, arXiv 1612.01474",
        training="K times one adapter's steps, side by side in a stack.",
        serving="K rows of one batch.",
    ),
    Method(
        kind="boost",
        name="samme",
        says="For labels: each round learns rows drawn by what the rounds before got wrong. Probabilities are averaged "
        "by the rounds' weights; it stops when the held-out log-loss no longer falls.",
        formula="w_k = log((1 - e_k) / e_k) + log(L - 1); a row that round k got wrong grows by exp(w_k)",
        paper="Zhu et al., Multi-class AdaBoost, Statistics and Its Interface 2, 2009",
        training="One adapter after another, and a pass over all rows after each.",
        serving="A row a round, in one batch.",
    ),
    Method(
        kind="boost",
        name="likelihood",
        says="For text: a mixture over tokens grows by a member trained on conversations weighted by their perplexity "
        "under the rounds so far; the step is the one that makes the held-out loss least.",
        formula="F = (1 - a) F + a h; a conversation weighs its perplexity under F, at most four times the mean",
        paper="Rosset and Segal, Boosting Density Estimation, NIPS 2002",
        training="One adapter after another, and a pass over all rows after each.",
        serving="A row a round, in one batch.",
    ),
)


def names_of(kind: str) -> tuple[str, ...]:
    """The methods of a kind, in the order in which they are described."""
    return tuple(method.name for method in METHODS if method.kind == kind)


def method_named(kind: str, name: str) -> Method:
    """The description of a method. Raises: InputError for one that there is not, with those that there are."""
    found = next((method for method in METHODS if (method.kind, method.name) == (kind, name)), None)
    if found is None:
        raise InputError(kind, [Problem("", f"'{name}' is no method. Use one of: {', '.join(names_of(kind))}.")])
    return found
