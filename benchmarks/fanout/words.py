"""Figures in words, the same everywhere."""

from __future__ import annotations

from typing import Any


def rate(value: float) -> str:
    return f"{value:,.0f}"


def ms(value: float | None) -> str:
    if value is None:
        return "–"
    if abs(value) >= 10_000:
        return f"{value / 1000:.1f} s"
    return f"{value:.1f} ms" if abs(value) < 10 else f"{value:,.0f} ms"


def us(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} µs" if value < 10 else f"{value:.1f} µs"


def times(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} ×" if value < 10 else f"{value:,.0f} ×"


def kib(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def told(figures: dict[str, Any]) -> str:
    """One row's figures on one line."""
    if "collapsed" in figures:
        return f"collapsed: {figures['collapsed']}"
    broken = f"  {', '.join(figures['broken'])}" if figures["broken"] else ""
    return (
        f"{rate(figures['per_second']):>8}/s"
        f"  {figures['complete']:>5,} complete{broken}"
        f"  p50 {ms(figures['p50_ms']):>7} p99 {ms(figures['p99_ms']):>7}"
        f"  {us(figures['cpu_us']):>8} of {figures['server_load']:.0%} CPU"
        f"  client {figures['client_load']:.0%}"
    )
