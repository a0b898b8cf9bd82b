# SPDX-License-Identifier: Apache-2.0
"""The `style` suite: what can be said about the sources without running them. One result a rule;
a failure names the first places. Works on what git knows or would take in."""
import concurrent.futures
import fnmatch
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.realpath(os.path.join(os.path.dirname(__file__), "../.."))
BUILD = os.environ.get("MEMD_BUILD", os.path.join(ROOT, "build"))
LLVM = "14"  # Debian 12's; other versions format some things differently and have other checks

# Which room includes from which (by directory pattern); system headers are not looked at. The
# compiler is given the same walls as include directories; this says by name what broke.
AGENT = ["memd/pages", "memd/*/agent", "vmm-hooks/agent", "vmm-hooks/gate"]
MAY_INCLUDE = [
    (["memd/common"], ["memd/common"]),
    (["memd/postcopy/common"], ["memd/postcopy/common", "memd/common"]),
    (AGENT, AGENT + ["memd/common", "memd/postcopy/common", "vmm-hooks/include/memd"]),
    (["vmm-hooks/include/memd"], ["vmm-hooks/include/memd"]),
    (["vmm-hooks/kvm"], ["vmm-hooks/kvm", "guest-drivers/bare", "vmm-hooks/include/memd"]),
    (["guest-drivers/bare"], ["guest-drivers/bare", "vmm-hooks/kvm"]),
    (["vmm-hooks/qemu"], ["vmm-hooks/qemu", "memd/common"]),
    (["vmm-hooks/sim"], ["vmm-hooks/sim", "memd", "memd/*/host", "memd/common"]),
    (["memd/ctl"], ["memd/ctl", "memd/common", "vmm-hooks/qemu"]),
    (["memd/postcopy/common"], ["memd/postcopy/common", "memd/common"]),
    (["memd/postcopy/mover"], ["memd/postcopy/mover", "memd/postcopy/common", "memd/common", "vmm-hooks/qemu"]),
    (["memd", "memd/*/host"], ["memd", "memd/*/host", "memd/common", "memd/postcopy/common"]),
]
NO_LICENCE_LINE = ["*.json", "*.md", "LICENSE", ".clang-*", ".gitignore", "*.expected", "tests/cli/data/*"]


def files():
    listed = subprocess.run(["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard"],
                            cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")
    return sorted(name for name in listed if name and os.path.isfile(os.path.join(ROOT, name)))


def read(name):
    with open(os.path.join(ROOT, name), "rb") as file:
        return file.read()


def c_files():
    return [name for name in files() if name.endswith((".c", ".h"))]


def matches(directory, patterns):
    """`*` stands for one name, not for several with slashes between."""
    return any(fnmatch.fnmatch(directory, pattern) and directory.count("/") == pattern.count("/")
               for pattern in patterns)


# ---- rules: each gives a list of "place: what" ----

def licence_lines():
    bad = []
    for name in files():
        if any(fnmatch.fnmatch(name, pattern) for pattern in NO_LICENCE_LINE):
            continue
        head = read(name)[:300].decode(errors="replace")
        wanted = "GPL-2.0-or-later" if name.startswith("guest-drivers/linux/") else "Apache-2.0"
        if f"SPDX-License-Identifier: {wanted}" not in head:
            bad.append(f"{name}: no line 'SPDX-License-Identifier: {wanted}' at the top")
    return bad


def no_binaries():
    return [f"{name}: a binary file" for name in files() if b"\0" in read(name)[:8000]]


def no_white_space_at_line_ends():
    bad = []
    for name in files():
        for number, line in enumerate(read(name).split(b"\n"), 1):
            if line.rstrip(b" \t\r") != line:
                bad.append(f"{name}:{number}: white space at the end")
    return bad


def rooms_include_only_their_neighbours():
    headers = {}
    for name in c_files():
        headers.setdefault(os.path.basename(name), []).append(os.path.dirname(name))
    bad = []
    for name in c_files():
        allowed = next((to for of, to in MAY_INCLUDE if matches(os.path.dirname(name), of)), None)
        if allowed is None:
            continue
        for included in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', read(name), re.M):
            included = included.decode()
            where = headers.get(os.path.basename(included), [])
            if not any(matches(directory, allowed) for directory in where):
                bad.append(f"{name}: includes \"{included}\" from another room")
    return bad


def lacks(tool):
    """Why the tool can't judge here; '' when it can."""
    if not shutil.which(tool):
        return f"{tool} is not here"
    words = subprocess.run([tool, "--version"], stdout=subprocess.PIPE, text=True).stdout
    version = re.search(r"version (\d+)", words)
    found = version.group(1) if version else "?"
    return "" if found == LLVM else f"{tool} {found} judges otherwise than {LLVM}, which is not here"


def clang_format():
    if lacks("clang-format"):
        return lacks("clang-format")
    done = subprocess.run(["clang-format", "--dry-run", "-Werror", *c_files()], cwd=ROOT,
                          stderr=subprocess.PIPE, text=True)
    return [line for line in done.stderr.split("\n") if "error:" in line]


def tidy_one(name):
    done = subprocess.run(["clang-tidy", "-quiet", "-p", BUILD, name], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return [line for line in done.stdout.split("\n") if re.search(r": (error|warning):", line)]


def clang_tidy():
    if lacks("clang-tidy"):
        return lacks("clang-tidy")
    if not os.path.exists(os.path.join(BUILD, "compile_commands.json")):
        return f"nothing was built in {BUILD}"
    names = [name for name in c_files()
             if name.endswith(".c") and name.startswith(("memd/", "vmm-hooks/", "guest-drivers/"))]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [line for lines in pool.map(tidy_one, names) for line in lines]


def shell_syntax():
    bad = []
    for name in files():
        first = read(name).split(b"\n", 1)[0]
        if not re.match(rb"#!.*\b(ba)?sh$", first) or b"busybox" in first:
            continue
        done = subprocess.run(["bash", "-n", name], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            bad.append(done.stderr.strip().split("\n")[0])
    return bad


def manual_pages():
    pages = [name for name in files() if re.match(r"memd/man/.*\.[1-8]$", name)]
    if not shutil.which("mandoc"):
        return "mandoc is not here"
    if not pages:
        return ["memd/man: no manual page"]
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", *pages], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return [line for line in done.stdout.split("\n") if line]


RULES = [licence_lines, no_binaries, no_white_space_at_line_ends, rooms_include_only_their_neighbours,
         clang_format, clang_tidy, shell_syntax, manual_pages]


def main():
    wanted = sys.argv[1:]
    failed = False
    for rule in RULES:
        name = f"style.{rule.__name__}"
        if wanted and rule.__name__ not in wanted:
            continue
        found = rule()
        if isinstance(found, str):
            print(f"skip {name}: {found}", flush=True)
        elif found:
            failed = True
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            print(f"not ok {name}: {'; '.join(found[:3])}{more}", flush=True)
        else:
            print(f"ok {name}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
