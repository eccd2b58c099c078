"""Known vulnerabilities of the packages that are installed: `make audit`.

pip-audit passes over what it finds no record of, and calls the rest clean. Here what was skipped is counted and named,
and an audit that could look at nothing fails.

Exit status: 0 none found, 1 some found, 2 no audit.
"""

from __future__ import annotations

import json
import subprocess
import sys

TIMEOUT = 20
"""Seconds to wait for the service."""


def main() -> int:
    """Run pip-audit on this environment and say what it found, skipped, or could not do."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--format", "json"]
    command += ["--progress-spinner", "off", "--timeout", str(TIMEOUT), *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"audit: no vulnerability data could be had ({reason[:300]}); go online and try again.", file=sys.stderr)
        return 2
    skipped = [package for package in packages if "skip_reason" in package]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        reason = skipped[0]["skip_reason"] if skipped else "nothing is installed"
        print(
            f"audit: no vulnerability data could be had for any of {len(packages)} packages ({reason}); go online and "
            "try again.",
            file=sys.stderr,
        )
        return 2
    found = [(package, flaw) for package in audited for flaw in package["vulns"]]
    for package, flaw in found:
        mended = ", ".join(flaw["fix_versions"]) or "no version"
        print(f"{package['name']} {package['version']}: {flaw['id']}, mended in {mended}")
    names = f" ({', '.join(package['name'] for package in skipped)})" if skipped else ""
    print(f"{len(audited)} packages audited, {len(found)} vulnerabilities; {len(skipped)} skipped{names}.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
