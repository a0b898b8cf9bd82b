# SPDX-License-Identifier: Apache-2.0
"""The laboratory: one directory, one memd, some guests, and the certainty that they end."""
import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile

from . import api, machine
from .errors import Failure, Skip, wait_for
from .guest import ArrivedProcess, Guest, MemvmGuest, memory_options, memvm_command, qemu_command

__all__ = ["Lab", "Failure", "Skip", "wait_for"]


class Lab:
    """Everything lives in `directory` (short: unix socket paths are). Use it as a context: on the
    way out all processes are killed and the directory is removed, unless something failed: then
    the logs stay. With `outlive` the processes don't die with us, and `keep` leaves them alone.
    network: the network namespace that memd and what it starts live in."""

    def __init__(self, outlive=False, network=None):
        self.directory = tempfile.mkdtemp(prefix="memd-")
        os.chmod(self.directory, 0o755)  # a VMM under another uid reaches its sockets
        self.socket = os.path.join(self.directory, "memd.sock")
        self.config = os.path.join(self.directory, "memd.conf")
        self.memd = None
        self._memd_program = machine.program("memd")
        self.guests = {}
        self.failed = False
        self.keep = False
        self._outlive = outlive
        self._network = network
        self._processes = []
        machine.needs_build()

    @functools.cached_property
    def _files(self):
        return machine.guest_files()

    @property
    def accelerator(self):
        return machine.accelerator(self._files)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        calm = (Skip, KeyboardInterrupt)
        self.failed = self.failed or (kind is not None and not issubclass(kind, calm))
        self.close()

    def close(self):
        """Ends what was started. The logs stay behind when something failed."""
        if self.keep:
            return
        self._stop_memd()
        self._end_movers()
        for process in reversed(self._processes):
            if process.poll() is None:
                process.kill()
            process.wait()
        self._end_arrived()
        for guest in self.guests.values():
            guest.console.close()
        if not self.failed:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _stop_memd(self):
        """In good order: it has the kernel's own KSM to put back as it found it."""
        if self.memd and self.memd.poll() is None:
            self.memd.terminate()
            try:
                self.memd.wait(10)
            except subprocess.TimeoutExpired:
                pass  # killed with the others

    def _end_movers(self):
        """They outlive their memd, and would wait for the next one."""
        try:
            with open(os.path.join(self.directory, "state", "migrations.json")) as file:
                pids = [each["pid"] for each in json.load(file)]
        except (FileNotFoundError, ValueError):
            return
        for pid in pids:
            if pid and machine.thread_name(pid, pid) == "memd-mover":
                os.kill(pid, signal.SIGKILL)

    def _end_arrived(self):
        """VMMs that a memd of this lab started and that nobody took for a guest: they have this directory in
        their command lines."""
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                with open(f"/proc/{int(entry)}/cmdline", "rb") as file:
                    ours = f"{self.directory}/".encode() in file.read()
                if ours and int(entry) != os.getpid():
                    os.kill(int(entry), signal.SIGKILL)

    # ---- processes ----

    def spawn(self, command, log, over=None, death="KILL", stdin=subprocess.DEVNULL):
        """Starts a program that dies with us (unless it is to outlive us); its words go to `log`.
        death: the signal that it gets when we are gone without having ended it.
        over: {'/proc/...': 'text'}, files that only this program sees with another content (a mount
        namespace of its own)."""
        wrapper = self._covering(over) if over else []
        if not self._outlive:
            wrapper += ["setpriv", "--pdeathsig", death]
        with open(os.path.join(self.directory, log), "a") as out:
            process = subprocess.Popen(wrapper + command, stdin=stdin, stdout=out,
                                       stderr=out, start_new_session=True)
        self._processes.append(process)
        return process

    def _covering(self, over):
        """Command words that bind the texts over the files and run what follows."""
        unshare = ["unshare", "--mount", "--propagation", "private"]
        if subprocess.run(unshare + ["true"], stderr=subprocess.DEVNULL).returncode != 0:
            raise Skip("no program can have mounts of its own here (unshare --mount fails)")
        script = ""
        for number, (path, text) in enumerate(over.items()):
            mine = os.path.join(self.directory, f"cover{number}.{len(self._processes)}")
            with open(mine, "w") as file:
                file.write(text)
            os.chmod(mine, 0o644)
            script += f"mount --bind {mine} {path} && "
        return unshare + ["sh", "-c", script + 'exec "$@"', "-"]

    def stage(self, agent="libmemd-preload.so"):
        """Programs, agent and guest where any user can read them (the checkout may be private), and
        with any of the build's agents in the place of the real one. Returns the directory."""
        place = os.path.join(self.directory, "stage-" + agent)
        if not os.path.isdir(place):
            os.makedirs(place + "/lib")
            os.makedirs(place + "/guest")
            shutil.copytree(os.path.join(machine.build_dir(), "bin"), place + "/bin")
            shutil.copy(machine.library(agent), place + "/lib/libmemd-preload.so")
            for name in ("vmlinuz", "initramfs"):
                shutil.copy(os.path.join(self._files, name), place + "/guest")
                os.chmod(f"{place}/guest/{name}", 0o644)
        return place

    def log(self, name):
        try:
            with open(os.path.join(self.directory, name), errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    # ---- memd ----

    def write_config(self, sections, domains):
        """sections: {'sharing': {'revisit_s': 1}}; domains: {'name': [uids]}"""
        merged = {"host": {"socket": self.socket, "state_dir": os.path.join(self.directory, "state")},
                  "sharing": {"revisit_s": 1, "cpu_percent": 100}}
        for name, keys in sections.items():
            merged.setdefault(name, {}).update(keys)
        for name, uids in domains.items():
            merged[f"domain {name}"] = {"uids": " ".join(str(uid) for uid in uids)}
        with open(self.config + ".new", "w") as file:
            for name, keys in merged.items():
                file.write(f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()))
        os.rename(self.config + ".new", self.config)

    def start_memd(self, sections=None, domains=None, over=None):
        """Writes the configuration and starts memd. Call it again after kill_memd() for a restart:
        without arguments the configuration is the one that stands."""
        if sections is not None or domains is not None or not os.path.exists(self.config):
            self.write_config(sections or {}, domains or {})
        os.makedirs(os.path.join(self.directory, "state"), exist_ok=True)
        inside = ["nsenter", f"--net=/run/netns/{self._network}"] if self._network else []
        self.memd = self.spawn([*inside, self._memd_program, "--config", self.config, "--foreground"],
                               "memd.log", over=over, death="TERM")
        wait_for("memd to answer", self._memd_answers, 30, 0.05)
        return self.memd

    def with_mover(self, script=None):
        """memd is to be a copy that has no memd-mover, or this shell script for one."""
        place = os.path.join(self.directory, "programs")
        os.makedirs(place, exist_ok=True)
        self._memd_program = shutil.copy(machine.program("memd"), place)
        if script:
            mover = os.path.join(place, "memd-mover")
            with open(mover, "w") as file:
                file.write(f"#!/bin/sh\n{script}\n")
            os.chmod(mover, 0o755)

    def _memd_answers(self):
        if self.memd.poll() is not None:
            raise Failure(f"memd ended with {self.memd.returncode}: {self.log('memd.log')[-800:]}")
        try:
            return api.request(self.socket, "GET", "/v1/status")[0] == 200
        except OSError:
            return False

    def kill_memd(self):
        self.memd.send_signal(signal.SIGKILL)
        self.memd.wait()

    def reload_memd(self, sections, domains):
        self.write_config(sections, domains)
        self.memd.send_signal(signal.SIGHUP)

    def get(self, target):
        status, answer = api.request(self.socket, "GET", target)
        if status != 200:
            raise Failure(f"GET {target}: {status} {answer}")
        return answer

    def status(self):
        return self.get("/v1/status")

    def sharing(self):
        return self.status()["sharing"]

    def guest_status(self, name):
        return self.get(f"/v1/guests/{name}")

    def memctl(self, *words):
        """(exit status, standard output, standard error)"""
        done = subprocess.run([machine.program("memctl"), "--socket", self.socket, *words],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    # ---- guests ----

    def start_guest(self, name, memory="192M", domain=None, plain=False, devices=(), append="",
                    run_options=(), uid=None, agent=None, over=None, seed=None, initramfs=None,
                    **regions):
        """Boots a guest under `memctl run` (or, when plain, without memd at all). agent: another one
        of the build. uid: the VMM gives up root for it after registration, as under libvirt.
        regions: sizes for the workload (common="64M"), and its options (duty=20). Returns at once."""
        regions["seed"] = seed if seed is not None else len(self.guests) + 1
        directory, files, memctl = self.directory, self._files, machine.program("memctl")
        as_user = []
        if agent:
            memctl = self.stage(agent) + "/bin/memctl"
        if uid is not None:
            files, memctl = self.stage() + "/guest", self.stage() + "/bin/memctl"
            directory = self._directory_of(uid)
            as_user = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups",
                       "--pdeathsig", "KILL"]
        command = as_user + qemu_command(
            files + "/vmlinuz", initramfs or files + "/initramfs", self.accelerator, name, directory,
            memory, f"{memory_options(regions)} {append}", list(devices))
        if not plain:
            options = ["--name", name, *(["--domain", domain] if domain else []), *run_options]
            if uid is not None:  # memctl sees setpriv, not QEMU: it can't read the RAM's size
                options += ["--max", memory]
            command = [memctl, "--socket", self.socket, "run", *options, "--", *command]
        process = self.spawn(command, f"{name}.stderr", over)
        guest = Guest(name, process, directory, os.path.join(self.directory, f"{name}.stderr"))
        self.guests[name] = guest
        return guest

    def start_memvm(self, name, memory="16M", cpus=1, domain=None, plain=False, run_options=(), save=None,
                    load=None, incoming=False, restore=None, memvm_options=(), seed=None, **regions):
        """Boots the bare guest in memvm under `memctl run` (or, when plain, without memd at all); load: goes
        on with a machine that was saved (restore: at once); incoming: waits for one. regions: sizes of what its memory holds (common="4M"), and its
        options (duty=20). Returns at once."""
        regions["seed"] = seed if seed is not None else len(self.guests) + 1
        command = memvm_command(name, self.directory, memory, cpus, regions, save, load, incoming, restore,
                                list(memvm_options))
        if not plain:
            options = ["--name", name, "--max", memory, *(["--domain", domain] if domain else []), *run_options]
            command = [machine.program("memctl"), "--socket", self.socket, "run", *options, "--", *command]
        process = self.spawn(command, f"{name}.stderr", stdin=subprocess.PIPE)
        guest = MemvmGuest(name, process, self.directory, os.path.join(self.directory, f"{name}.stderr"))
        self.guests[name] = guest
        return guest

    # ---- guests that arrive from another lab ----

    def awaits_memvm(self, name, memory="16M", cpus=1, uid=0):
        """The section of memd.conf by which a guest of that name may come here into memvm."""
        os.mkfifo(os.path.join(self.directory, f"{name}.input"))
        command = (f"exec {machine.program('memvm')} --incoming --memory {memory} --cpus {cpus} "
                   f"--serial {self.directory}/{name}.log <> {self.directory}/{name}.input "
                   f"2>> {self.directory}/{name}.stderr")
        return {f"guest {name}": {"max": memory, "incoming_user": uid,
                                  "incoming": f"/bin/sh {self._script(name, command)}"}}

    def awaits_qemu(self, name, memory="192M", devices=(), prefix=""):
        """The same for a stock QEMU under `memctl run`, which `prefix` may start."""
        qemu = qemu_command(self._files + "/vmlinuz", self._files + "/initramfs", self.accelerator, name,
                            self.directory, memory, "", list(devices))
        command = [machine.program("memctl"), "--socket", self.socket, "run", "--name", name, "--incoming", "--",
                   *qemu]
        script = self._script(name, f"exec {prefix} {shlex.join(command)} 2>> {self.directory}/{name}.stderr")
        return {f"guest {name}": {"max": memory, "incoming_user": 0, "incoming": f"/bin/sh {script}"}}

    def _script(self, name, command):
        path = os.path.join(self.directory, f"{name}.sh")
        with open(path, "w") as file:
            file.write(command + "\n")
        os.chmod(path, 0o755)
        return path

    def arrived_memvm(self, name):
        """The guest that is here now. Its console begins with its arrival."""
        pid = self.guest_status(name)["pid"]
        pipe = open(os.path.join(self.directory, f"{name}.input"), "r+b", buffering=0)  # pylint: disable=consider-using-with
        guest = MemvmGuest(name, ArrivedProcess(pid, pipe), self.directory,
                           os.path.join(self.directory, f"{name}.stderr"))
        self.guests[name] = guest
        self._processes.append(guest.process)
        return guest

    def arrived_qemu(self, name):
        """The guest that is here now. Its console begins with its arrival."""
        guest = Guest(name, ArrivedProcess(self.guest_status(name)["pid"], None), self.directory,
                      os.path.join(self.directory, f"{name}.stderr"))
        self.guests[name] = guest
        return guest

    def _directory_of(self, uid):
        directory = os.path.join(self.directory, f"of-{uid}")
        os.makedirs(directory, exist_ok=True)
        os.chown(directory, uid, uid)
        return directory

    def wait_connected(self, *names, seconds=120):
        def connected():
            guests = {guest["name"]: guest for guest in self.status()["guests"]}
            return all(guests.get(name, {}).get("agent") == "connected" for name in names)
        wait_for(f"the agents of {', '.join(names)}", connected, seconds, 0.2)

    def vmm_pids(self):
        return [guest.pid for guest in self.guests.values() if guest.is_alive()]

    def pids(self):
        memd = [self.memd.pid] if self.memd and self.memd.poll() is None else []
        return memd + self.vmm_pids()

    def wait_shared(self, pages, seconds=120):
        """Until at least so many pages are saved by sharing (zero pages not counted)."""
        wait_for(f"{pages} pages to be shared", lambda: self.sharing()["pages_sharing"] >= pages,
                 seconds, 0.3)

    def report_all(self):
        """All living guests verify all their memory, at the same time."""
        living = [guest for guest in self.guests.values() if guest.is_alive()]
        tags = [(guest, guest.ask("report")) for guest in living]
        return {guest.name: guest.judge(guest.await_answer(tag, "report")) for guest, tag in tags}
