"""A conversation between tokens and text: what is appended, what is counted, how it ends."""

import threading
import time

import pytest
import torch
from test_chat_format import CHATML, tokenizer

from grouprl.errors import TrainingError
from grouprl.lm.agents.chat_format import ChatFormat
from grouprl.lm.agents.conversation import Conversation, Conversations, Rules
from grouprl.lm.agents.interaction import Answer, Interaction
from grouprl.lm.prompts import Prompt
from grouprl.lm.sample.turns import Reply, Turn

TOKENIZER = tokenizer(CHATML)
FORM = ChatFormat(TOKENIZER, {}, [TOKENIZER.eos_token_id])
ROW = Prompt(0, "", {}, ())
ASKED = [{"role": "user", "content": "Go."}]


class Scripted(Interaction):
    """Gives the answers of a list."""

    def __init__(self, *answers) -> None:
        self.answers, self.heard = list(answers), []

    def answer(self, said):
        self.heard.append(said)
        answer = self.answers.pop(0)
        return answer() if callable(answer) else answer


def conversation(*answers, prompt=ASKED, turns=None, anew=False, timeout=5.0, most=100) -> Conversation:
    playing = Scripted(*answers)
    return Conversation(playing, ROW, FORM.first(prompt, [], ROW, "row 0"), FORM, Rules(turns, anew, timeout, most))


def turn(text: str, finished: bool = True) -> Turn:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return Turn([*ids, TOKENIZER.eos_token_id] if finished else ids, finished)


def test_a_turn_that_a_stop_string_ended_is_ended_and_its_end_is_the_partners() -> None:
    c, ids = conversation(Answer("More.")), TOKENIZER("On", add_special_tokens=False)["input_ids"]
    reply = c.reply(Turn(ids, True, stopped=True))
    assert reply.ids[0] == TOKENIZER.eos_token_id
    assert (c.interaction.heard[0].text, c.interaction.heard[0].finished) == ("On", True)


def test_turns_are_heard_answered_and_counted() -> None:
    c = conversation(
        Answer("More.", 0.5, state="s", metrics={"moves": 1}), Answer("End.", 1, True, metrics={"moves": 2})
    )
    reply = c.reply(turn("One."))
    assert TOKENIZER.decode(reply.ids) == "\n<|start|>user\nMore.<|end|>\n<|start|>assistant\n"
    assert c.reply(turn("Two.")) == Reply(over=True)
    assert [said.text for said in c.interaction.heard] == ["One.", "Two."]
    assert (c.rewards, c.states, c.metrics) == ([0.5, 1.0], ["s", None], {"moves": 3.0})
    assert (c.terminated, c.truncated) == (True, False)
    assert [m["content"] for m in c.messages] == ["Go.", "One.", "More.", "Two.", "End."]
    assert [m["content"] for m in c.completion] == ["One.", "More.", "Two.", "End."]
    c.cut()
    assert not c.truncated


def test_a_turn_that_was_cut_off_is_ended_by_the_reply() -> None:
    c = conversation(Answer("More."))
    assert c.reply(turn("On", finished=False)).ids[0] == TOKENIZER.eos_token_id
    assert not c.interaction.heard[0].finished


def test_the_number_of_turns_is_bounded_and_that_is_no_termination() -> None:
    c = conversation(Answer("More."), Answer("More."), turns=2)
    assert not c.reply(turn("One.")).over
    assert c.reply(turn("Two.")).over
    assert (c.terminated, c.truncated) == (False, True)


def test_what_the_model_has_not_read_is_no_part_of_a_conversation_that_was_cut() -> None:
    c = conversation(Answer("More."), Answer("A long answer."))
    c.reply(turn("One."))
    c.reply(turn("Two."))
    c.cut()
    assert [m["content"] for m in c.messages] == ["Go.", "One.", "More.", "Two."]
    assert c.truncated


def test_text_is_appended_as_it_is() -> None:
    c = conversation(Answer(" b"), Answer(None, terminated=True), prompt="a")
    assert TOKENIZER.decode(c.reply(turn("1", finished=False)).ids) == " b"
    c.reply(turn("2"))
    assert c.completion == "1 b2"


def test_a_rewritten_history_begins_a_new_sample() -> None:
    c = conversation(Answer([{"role": "user", "content": "Summary."}], anew=True))
    reply = c.reply(turn("One."))
    assert reply.anew
    assert TOKENIZER.decode(reply.ids) == "<|start|>user\nSummary.<|end|>\n<|start|>assistant\n"


def test_where_each_turn_is_a_sample_it_sees_the_first_prompt_and_the_last_exchange() -> None:
    c = conversation(Answer("More."), Answer("Still more."), anew=True)
    c.reply(turn("One."))
    reply = c.reply(turn("Two."))
    assert reply.anew
    assert TOKENIZER.decode(reply.ids) == (
        "<|start|>user\nGo.<|end|>\n<|start|>assistant\nTwo.<|end|>\n<|start|>user\nStill more.<|end|>\n"
        "<|start|>assistant\n"
    )


def test_what_is_said_has_a_bounded_length() -> None:
    c = conversation(Answer("x" * 1_000_000))
    assert len(c.reply(turn("One.")).ids) < 150
    assert c.messages[-1]["content"].endswith("[cut: 1000000 characters]")


def raises() -> Answer:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            raises,
            r"the environment Scripted raised KeyError: 'x' in turn 1 of an episode, at line \d+ of .*; let it say",
        ),
        (None, "turn 1 of an episode of the environment Scripted was answered with None; answer must return an Answer"),
        (Answer(3), "turn 1 .* was answered with 3 of type int, which is not text"),
        (Answer([3]), "was answered with 3 of type int, which is not text"),
        (Answer([{"role": "user", "content": b"x"}]), "answered with b'x' of type bytes, which is not text"),
        (Answer("x", reward=None), "the reward of turn 1 of the environment Scripted is None"),
        (Answer("x", reward=float("nan")), "the reward of turn 1 of the environment Scripted is nan"),
        (Answer("x", reward="1"), "is '1' of type str; give a number"),
        (Answer("x", metrics={"m": "x"}), "the metric 'm' of turn 1 .* is 'x'; give a finite number"),
    ],
)
def test_what_an_interaction_may_do_wrong_is_named_with_its_turn(answer, said: str) -> None:
    partner = Conversations([conversation(Answer("x")), conversation(answer)])
    assert not partner.reply(0, turn("One.")).over
    assert partner.reply(1, turn("One.")).over
    with pytest.raises(TrainingError, match=said):
        partner.check()
    assert partner.reply(0, turn("Two.")).over  # the others end soon


def test_an_answer_that_does_not_come_ends_its_episode_alone() -> None:
    ended = threading.Event()

    def hang() -> Answer:
        while not ended.is_set():
            time.sleep(0.01)
        return Answer()

    c = conversation(hang, timeout=0.1)
    partner = Conversations([c])
    assert partner.reply(0, turn("One.")).over
    ended.set()
    partner.check()
    assert (c.broken, c.truncated, c.metrics) == (True, True, {"environment/timeouts": 1.0})


def test_the_models_tokens_are_never_tokenised_again() -> None:
    """A turn in a spelling that the tokenizer would not choose is decoded for reading, and that is all."""
    c = conversation(Answer("More."))
    torch.manual_seed(0)
    ids = torch.randint(0, 200, (20,)).tolist()
    reply = c.reply(Turn([*ids, TOKENIZER.eos_token_id], True))
    assert reply.ids == FORM.following([{"role": "user", "content": "More."}])


def test_a_turn_of_its_own_shows_in_plain_text_what_the_model_said_with_its_calls() -> None:
    class Calling(Scripted):
        tools = ({"function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}},)

    start = FORM.first("Go. ", Calling.tools, ROW, "row 0")
    c = Conversation(Calling(Answer("12")), ROW, start, FORM, Rules(None, True, 5.0, 100))
    reply = c.reply(turn("<tool_call>f(3)</tool_call>"))
    assert TOKENIZER.decode(reply.ids).endswith("\n\nGo. <tool_call>f(3)</tool_call>12")


def test_a_new_prompt_is_not_cut() -> None:
    long = "word " * 100
    reply = conversation(Answer(long, anew=True)).reply(turn("One."))
    assert long in TOKENIZER.decode(reply.ids)


@pytest.mark.parametrize("name", ["reward", "loss", "episodes/mean_turns", "a\nb", 3])
def test_a_metric_that_would_take_the_place_of_another_is_refused(name) -> None:
    with pytest.raises(TrainingError, match=r"turn 1 of an episode .* has a metric called .*; choose another name"):
        conversation(Answer("More.", metrics={name: 1.0})).reply(turn("One."))


def test_every_episode_has_the_metrics_that_are_counted() -> None:
    class Counts(Scripted):
        counted = ("won",)

    made = Conversation(Counts(), ROW, FORM.first(ASKED, [], ROW, "row 0"), FORM, Rules(None, False, 5.0, 100, ("a",)))
    assert made.metrics == {"a": 0.0, "won": 0.0}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer("x", terminated="no"), r"terminated of turn 1 of an episode .* is 'no' \(str\); give True or False"),
        (Answer("x", truncated=None), r"truncated of turn 1 of an episode .* is None \(NoneType\); give True or False"),
        (Answer(None, anew=True), "turn 1 of an episode .* was answered anew without a message; give the whole new"),
        (Answer("x", metrics=None), "turn 1 of an episode .* was answered with .*; answer must return an Answer, its"),
        (
            Answer([{"role": "user", "content": "x", "image": object()}]),
            "turn 1 of an episode .* was answered with a message whose 'image' is .*; leave it out",
        ),
    ],
)
def test_what_an_answer_must_not_be_names_the_turn(answer: Answer, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        conversation(answer).reply(turn("One."))


def test_rewards_that_mean_nothing_are_not_learned_from() -> None:
    c = conversation(Answer("More.", 5.0))
    c.interaction.gives_rewards = False
    c.reply(turn("One."))
    assert c.rewards == [0.0]


def test_where_the_model_spoke_is_known_whatever_roles_an_answer_has() -> None:
    summary = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "It began."}]
    c = conversation(Answer(summary, 1.0, anew=True), Answer("End.", 2.0, terminated=True))
    c.reply(turn("One."))
    c.reply(turn("Two."))
    assert [c.messages[place]["content"] for place in c.spoken] == ["One.", "Two."]


def test_what_is_said_after_the_last_turn_is_no_part_of_the_episode() -> None:
    """Only the other side's own end is: a model that has turns left could have read the rest."""
    for ends, kept in (({}, []), ({"terminated": True}, ["12"]), ({"truncated": True}, ["12"])):
        c = conversation(Answer("12", **ends), turns=1)
        assert c.reply(turn("What?")).over
        c.cut()
        assert [message["content"] for message in c.completion] == ["What?", *kept]


@pytest.mark.parametrize("anew", [False, True])
def test_the_first_turn_continues_a_message_that_the_prompt_ends_in(anew: bool) -> None:
    prompt = [*ASKED, {"role": "assistant", "content": "On"}]
    c = conversation(Answer("More."), Answer(terminated=True), prompt=prompt, anew=anew)
    ids = c.reply(turn("e.")).ids
    assert c.reply(turn("Two.")).over
    assert [said.text for said in c.interaction.heard] == ["One.", "Two."]
    assert [message["content"] for message in c.completion] == ["One.", "More.", "Two."]
    assert [c.messages[i]["content"] for i in c.spoken] == ["One.", "Two."]
    if anew:
        said = [("user", "Go."), ("assistant", "One."), ("user", "More.")]
        read = "".join(f"<|start|>{role}\n{content}<|end|>\n" for role, content in said)
        assert TOKENIZER.decode(ids) == f"{read}<|start|>assistant\n"


def test_special_tokens_are_left_out_where_that_was_asked_for() -> None:
    form = ChatFormat(TOKENIZER, {}, [TOKENIZER.eos_token_id], skip_special_tokens=True)
    for prompt in (ASKED, "Go."):
        playing = Scripted(Answer(terminated=True))
        c = Conversation(playing, ROW, form.first(prompt, [], ROW, "row 0"), form, Rules(None, False, 5.0, 100))
        c.reply(turn("<|start|>12"))
        assert playing.heard[0].text == "12"
        assert c.completion == ("12" if isinstance(prompt, str) else [{"role": "assistant", "content": "12"}])
