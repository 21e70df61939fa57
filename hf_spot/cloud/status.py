"""`hf-spot status` and `hf-spot terminate`: the state of a run's machines, and ending them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_spot.cloud.ec2 import Cloud
from hf_spot.cloud.ending import in_words
from hf_spot.cloud.ledger import Ledger, Machine
from hf_spot.cloud.machine_records import MachineRecords
from hf_spot.cloud.network import Networks


def terminate(records: MachineRecords, cloud: Cloud, note: Callable[[str], object] = lambda text: None) -> list[Machine]:
    """End all machines of a run, tell a ``--watch`` to start no other, and remove their launch templates and groups.

    A group that machines still use while they shut down is noted; the ``--watch``, or the next call, removes it.

    Raises:
        CloudError: the cloud refused.
    """
    regions = cloud.regions()
    records.refresh()
    cloud.each(regions, lambda region: cloud.tag_requested(region, records.run.url))
    alive = records.reconcile(records.find_instances(regions), regions)
    for region in sorted({one.region for one in alive}):
        cloud.terminate(region, [one.id for one in alive if one.region == region], stop=True)
    for region in sorted({one.region for one in alive} | {machine.region for machine in records.ledger.machines}):
        cloud.remove_templates(region, records.run.url)
    if records.ledger.wanted:
        regions = sorted({machine.region for machine in records.ledger.machines})
        if left := Networks(cloud, records.run.url, {}).remove(regions):
            note(f"still in use while machines shut down: {', '.join(left)}; later: hf-spot terminate {records.run.url}")
    ids = {one.id for one in alive}
    gone = {one.id: one for one in records.find_instances(sorted({one.region for one in alive}))} if alive else {}
    for machine in records.ledger.live():
        if machine.instance_id in ids:
            now = gone.get(machine.instance_id)
            records.ended(machine, now and replace(now, reason="Client.UserInitiatedShutdown"), stop=True)
    return [machine for machine in records.ledger.machines if machine.instance_id in ids]


def had_machines(records: MachineRecords) -> bool:
    """Return whether the journal says that `hf-spot provision` has ever worked on the run."""
    return any(entry.kind == "machine" for entry in records.run.events())


def status(records: MachineRecords, cloud: Cloud | None) -> dict[str, Any]:
    """Return the state of a run and its machines as JSON values, without changing anything.

    Args:
        records: of the run's machines.
        cloud: the account's EC2; None to say only what the journal says.

    Raises:
        CloudError: the cloud refused.
    """
    regions = cloud.regions() if cloud is not None else []
    ledger = records.refresh()
    found = {one.id: one for one in records.find_instances(regions)} if cloud is not None else {}
    machines = []
    for machine in ledger.machines:
        now = found.get(machine.instance_id)
        state = "ended" if machine.ended else now.state if now else "gone"
        machines.append({**machine.to_data(), "state": state})
    unwritten = [one.id for one in found.values() if one.id not in {machine.instance_id for machine in ledger.machines}]
    known: dict[str, Any] = {
        "run": records.run.url,
        "ended": records.state.ended,
        "step": ledger.step,
        "max_steps": ledger.max_steps,
        "hours_left": ledger.hours_left(None),
        "spent_usd": round(records.spent_usd(), 6),
        "spent_bound": records.cost_bound(),
        "traffic_usd": records.traffic_usd() if cloud is not None else None,
        "machines": machines,
        "not_in_the_journal": unwritten,
    }
    if ledger.wanted and records.state.ended != "finished":
        known["fleet"] = _fleet(ledger, records)
    return known


def _fleet(ledger: Ledger, records: MachineRecords) -> dict[str, Any]:
    """Return how many machines there are, how many are missing, and why."""
    least, _, most = ledger.wanted.partition(":")
    live = ledger.live()
    missing = max(0, int(most or least) - len(live))
    why = ""
    if missing:
        why = "terminated on request" if ledger.stopped else ledger.why_missing
        if not why and ledger.walk is not None:
            why = "they are being asked for"
        if not why and (ended := [one for one in ledger.machines if one.ended]):
            last = max(ended, key=lambda one: one.ended or one.began)
            why = f"{last.instance_id} ended ({last.reason}); hf-spot provision --watch replaces it"
    return {
        "wanted": ledger.wanted,
        "least": int(least),
        "most": int(most or least),
        "live": len(live),
        "missing": missing,
        "why_missing": why,
        "usd_per_hour": round(sum(records.usd_per_hour_now(one) for one in live), 6),
    }


def render_status(known: dict[str, Any]) -> str:
    """Format the result of `status`, one machine per line."""
    of = f" of {known['max_steps']}" if known["max_steps"] else ""
    is_done = known["ended"] == "finished"
    hours = f", about {known['hours_left']:.1f} h left" if known["hours_left"] is not None and not is_done else ""
    head = (
        f"{known['run']}: {known['ended'] or 'not ended'}, step {known['step']}{of} committed{hours}, "
        f"{in_words(known['spent_usd'], known['spent_bound'])}"
    )
    lines = [head]
    if known["traffic_usd"]:
        lines.append(f"  ${known['traffic_usd']:.2f} of it at most for traffic with the store")
    if fleet := known.get("fleet"):
        lines.append(f"  {fleet['live']} of {fleet['wanted']} machines, ${fleet['usd_per_hour']:.4f}/h")
        if fleet["missing"]:
            lines.append(f"  {fleet['missing']} missing: {fleet['why_missing'] or 'not asked for yet'}")
    for one in known["machines"]:
        usd = "?" if one["usd_per_hour"] is None else f"${one['usd_per_hour']:.4f}/h"
        cost = "" if one["cost_usd"] is None else f", {in_words(one['cost_usd'], one['cost_bound'])}"
        cost += f" + ${one['disk_usd']:.2f} disk" if one["disk_usd"] else ""
        kind = f"{one['instance_type']} {one['market']} in {one['zone']}"
        why = f" ({one['reason']})" if one["reason"] else ""
        lines.append(f"  {one['instance_id']}  {kind}  {usd}  since {one['began'][:16]}  {one['state']}{why}{cost}")
    lines += [f"  {name}  not in the journal yet: hf-spot provision records it" for name in known["not_in_the_journal"]]
    return "\n".join(lines)
