"""The settings of the objective, which mean the same in both arenas, and which of them do not go together."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from grouprl.objective import LOSSES, Objective


class ObjectiveSettings(BaseModel):
    """The settings of the objective that mean the same in both arenas. A step is a step of an episode, or a token."""

    # --- objective -----------------------------------------------------------------------------------------------
    epsilon: float = Field(0.2, gt=0, lt=1, description="ratio is clipped below 1 - epsilon; width of spo")
    epsilon_high: float | None = Field(
        None, gt=0, description="ratio is clipped above 1 + epsilon_high; default: epsilon; for cispo the cap itself"
    )
    delta: float | None = Field(
        None, gt=1, description="bound of the ratio where the advantage is negative (two-sided or dual clip)"
    )
    sapo_temperature_pos: float = Field(1.0, gt=0, description="of sapo's gate where the advantage is positive")
    sapo_temperature_neg: float = Field(1.05, gt=0, description="of sapo's gate where it is not")
    dppo_threshold: float | None = Field(
        None, gt=0, lt=1, description="how far dppo lets a probability move; default: 0.2 for dppo_tv, 0.05 for dppo_kl"
    )
    beta: float = Field(0.0, ge=0, description="weight of the KL divergence to the reference; 0 = no reference")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="divide by the standard deviation of the group, of the batch, or not (Dr. GRPO); "
        "True = group, False = none; for advantage=outcome and gigpo, the others scale in their own way",
    )
    gigpo_weight: float = Field(
        1.0, ge=0, description="weight of gigpo's comparison of returns-to-go in equal states; 0 leaves outcome"
    )

    @field_validator("scale_rewards", mode="before")
    @classmethod
    def _scale(cls, value: Any) -> Any:
        return {True: "group", False: "none"}[value] if isinstance(value, bool) else value


def objective_problems(c: ObjectiveSettings, loss_type: str, advantage: str) -> list[str]:
    """Settings of the objective that do not go together: one sentence each, with how to fix it."""
    found: list[str] = []
    if advantage == "gigpo" and c.scale_rewards == "batch":
        found.append("scale_rewards='batch' does not go with advantage='gigpo'; set 'group' or 'none'")
    if advantage != "gigpo" and c.gigpo_weight != type(c).model_fields["gigpo_weight"].default:
        found.append(
            f"gigpo_weight={c.gigpo_weight} is for advantage='gigpo', and advantage is {advantage!r}; leave it out"
        )
    loss = LOSSES[loss_type]
    if loss.cap and (c.epsilon_high is None or c.epsilon_high <= 1):
        found.append(
            f"epsilon_high={c.epsilon_high}: with loss_type={loss_type!r} it is the cap of the ratio itself, as in "
            "TRL, and must exceed 1; 5.0 is usual"
        )
    high = Objective.of(c).high
    if c.delta is not None and "delta" in loss.parameters and c.delta <= 1 + high:
        found.append(f"delta={c.delta} must exceed 1 + epsilon_high = {1 + high:g}; 3.0 or 4.0 is usual")
    for name in sorted({name for other in LOSSES.values() for name in other.parameters} - set(loss.parameters)):
        setting = type(c).model_fields.get(name)
        if name == "epsilon" or setting is None or getattr(c, name) == setting.default:
            continue  # epsilon has a value in every configuration, so that many scripts name it with every loss
        users = [repr(known) for known, other in LOSSES.items() if name in other.parameters]
        advice = "; for its width set epsilon" if loss_type == "spo" else ""
        found.append(
            f"{name}={getattr(c, name)} is for loss_type {' or '.join(users)}, and loss_type is {loss_type!r}; leave "
            f"it out{advice}"
        )
    return found
