# SPDX-License-Identifier: LGPL-2.1-or-later

DESTDIR ?=
PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
# Beside the program as a directory with bytecode, so that Python starts it without compiling it. The dracut
# module looks for it in ../lib/storagetm, seen from the program.
LIBDIR ?= $(PREFIX)/lib/storagetm
MANDIR ?= $(PREFIX)/share/man
# Whatever PREFIX is: systemd looks here, and before the directory where it keeps its own storage-target-mode.target,
# while /etc stays free for the administrator's changes.
UNITDIR ?= /usr/local/lib/systemd/system
RULESDIR ?= /usr/local/lib/udev/rules.d
# dracut looks nowhere else.
DRACUTDIR ?= /usr/lib/dracut/modules.d
# What the interpreter line names, and whose bytecode is installed and packed.
PYTHON ?= /usr/bin/python3
# Other interpreters whose bytecode the one file shall have, too, such as: python3.13 python3.11
BYTECODE ?=

VENV := .venv/bin
UNITS := units/storage-target-mode.target units/storagetm.service units/storagetm-failure.service \
	units/storagetm-tlshd.service
RULES := units/54-storagetm.rules
GETTYS := console-getty.service getty@.service serial-getty@.service
DRACUT_FILES := 70-storagetm-link-local.network dhcp-link-local.conf network-generator.conf pcrphase.conf \
	zzzz-storagetm.network
DRACUT_SCRIPTS := dhcp-link-local module-setup.sh python-initrd
MAN_PAGE := $(wildcard docs/storagetm.8)
# Asked for by lint alone: where the project is only installed there need be no git.
SHELL_FILES = $(shell git ls-files -z | xargs -0 awk 'FNR == 1 && /^\#!.*[ \/](ba)?sh( |$$)/ {print FILENAME}')
PYTHON_FILES = $(shell git ls-files '*.py') dracut-module/python-initrd

PYTEST := $(VENV)/python -m pytest -ra --durations=10
SIDE_BY_SIDE := --dist=worksteal --maxprocesses=4 --numprocesses=$(if $(T),0,auto)
# A test with its two machines keeps less than one processor busy. Each process has machines of its own, of 1 GB in all.
IN_MACHINES := --verbose $(SIDE_BY_SIDE)

# Without docstrings and columns, bytecode is a sixth smaller, and so is the time to load it, 5 ms on a PC.
define COMPILE
import importlib.util, py_compile, sys
py_compile.compile(sys.argv[1], importlib.util.cache_from_source(sys.argv[1], optimization=""), sys.argv[2],
    doraise=True, optimize=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
endef
export COMPILE

.PHONY: all install install-program uninstall lint help deps test test-unit test-vm test-reach bench soak fuzz shell demo clean

all: storagetm.pyz  ## Pack the program into storagetm.pyz; BYTECODE="PYTHON..." for bytecode of further interpreters

storagetm.pyz: storagetm.py build_zipapp.py
	$(PYTHON) build_zipapp.py --output $@ $(BYTECODE:%=--bytecode=%)

install: install-program  ## Install the program, its units and udev rule, the dracut module and the manual page; see DESTDIR, PREFIX
	install -d $(DESTDIR)$(UNITDIR) $(DESTDIR)$(DRACUTDIR)/95storagetm
	install -m 0644 $(UNITS) $(DESTDIR)$(UNITDIR)
	for unit in $(GETTYS); do \
		install -D -m 0644 units/getty.conf $(DESTDIR)$(UNITDIR)/$$unit.d/storagetm.conf || exit 1; \
	done
	sed -i 's|^ExecStart=[^ ]*|ExecStart=$(BINDIR)/storagetm|' $(DESTDIR)$(UNITDIR)/storagetm.service
	sed -i 's|[^ ]*/tlshd.conf$$|$(LIBDIR)/tlshd.conf|' $(DESTDIR)$(UNITDIR)/storagetm-tlshd.service
	install -m 0644 units/tlshd.conf $(DESTDIR)$(LIBDIR)
	install -d $(DESTDIR)$(RULESDIR)
	install -m 0644 $(RULES) $(DESTDIR)$(RULESDIR)
	install -m 0755 $(DRACUT_SCRIPTS:%=dracut-module/%) $(DESTDIR)$(DRACUTDIR)/95storagetm
	install -m 0644 $(DRACUT_FILES:%=dracut-module/%) $(DESTDIR)$(DRACUTDIR)/95storagetm
ifneq ($(MAN_PAGE),)
	install -d $(DESTDIR)$(MANDIR)/man8
	install -m 0644 $(MAN_PAGE) $(DESTDIR)$(MANDIR)/man8
endif

install-program:  # The program alone, for bytecode of another machine's Python.
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(LIBDIR)
	install -m 0644 storagetm.py $(DESTDIR)$(LIBDIR)
	$(PYTHON) -X no_debug_ranges -c "$$COMPILE" $(DESTDIR)$(LIBDIR)/storagetm.py $(LIBDIR)/storagetm.py
	printf '%s\n' '#!$(PYTHON) -IS' 'import sys' 'sys.path.insert(0, "$(LIBDIR)")' \
		'from storagetm import main' 'sys.exit(main())' >$(DESTDIR)$(BINDIR)/storagetm
	chmod 0755 $(DESTDIR)$(BINDIR)/storagetm

uninstall:  ## Remove what install has installed
	rm -f $(DESTDIR)$(BINDIR)/storagetm
	rm -rf $(DESTDIR)$(LIBDIR)
	rm -f $(addprefix $(DESTDIR)$(UNITDIR)/,$(notdir $(UNITS)))
	rm -f $(GETTYS:%=$(DESTDIR)$(UNITDIR)/%.d/storagetm.conf)
	-rmdir --ignore-fail-on-non-empty $(GETTYS:%=$(DESTDIR)$(UNITDIR)/%.d)
	rm -f $(addprefix $(DESTDIR)$(RULESDIR)/,$(notdir $(RULES)))
	rm -f $(addprefix $(DESTDIR)$(DRACUTDIR)/95storagetm/,$(DRACUT_SCRIPTS) $(DRACUT_FILES))
	-rmdir --ignore-fail-on-non-empty $(DESTDIR)$(DRACUTDIR)/95storagetm
	rm -f $(DESTDIR)$(MANDIR)/man8/storagetm.8

# Each tool sees everything it is for; the first complaint ends it.
lint: deps  ## Check formatting, types, the oldest Python, shell scripts, units and the manual page
	$(VENV)/ruff format --check $(PYTHON_FILES)
	$(VENV)/ruff check $(PYTHON_FILES)
	$(VENV)/mypy $(PYTHON_FILES)
	$(VENV)/vermin --quiet --no-tips -t=3.9- storagetm.py build_zipapp.py dracut-module/python-initrd
	shellcheck $(SHELL_FILES)
	units/verify
ifneq ($(MAN_PAGE),)
	test -z "$$(LC_ALL=C.UTF-8 MANROFFSEQ= MANWIDTH=80 man --warnings -E UTF-8 -l -Tutf8 -Z $(MAN_PAGE) 2>&1 >/dev/null | tee /dev/stderr)"
endif

help:  ## Show this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 12

deps:  # What the tests need; quick when it is there already.
	@tests/install-deps

test: deps  ## Everything that must pass: lint, test-unit, test-vm
	$(MAKE) lint
	$(MAKE) test-unit
	$(MAKE) test-vm

test-unit: deps  ## Tests that need no kernel but the one they run on; T=NAME for those whose name has NAME in it
	$(PYTEST) $(SIDE_BY_SIDE) --ignore=tests/vm $(if $(T),-k '$(T)') tests

test-vm: deps storagetm.pyz  ## Tests in emulated machines; T=NAME for those whose name has NAME in it
	$(PYTEST) $(IN_MACHINES) -m 'not reach' $(if $(T),-k '$(T)') tests/vm

test-reach: deps storagetm.pyz  ## Further tests in emulated machines, most of them on Debian unstable; takes hours; T=NAME
	@tests/install-deps reach
	$(PYTEST) $(IN_MACHINES) -m reach --release=sid $(if $(T),-k '$(T)') tests/vm

bench: storagetm.pyz  ## All comparisons with systemd-storagetm; writes docs/benchmarks.md; takes an hour or two; BEFORE=COMMIT; ONLY=PART prints that part
	@tests/install-deps bench
	$(VENV)/python -m tests.programs.bench $(if $(BEFORE),--before='$(BEFORE)') $(if $(ONLY),--only='$(ONLY)')

soak: deps storagetm.pyz  ## 20 minutes of load with everything around it changing; MINUTES=N for more or less
	$(VENV)/python -m tests.programs.soak $(if $(MINUTES),--minutes=$(MINUTES))

fuzz:  ## 10 minutes of made-up input for each parser; SECONDS_EACH=N for more or less
	@tests/install-deps fuzz
	$(VENV)/python -m tests.programs.fuzz $(if $(SECONDS_EACH),--seconds=$(SECONDS_EACH))

shell: deps storagetm.pyz  ## A root shell in an emulated machine, with the tool and two disks; IMAGE=bookworm or sid for others
	$(VENV)/python -m tests.harness.shell $(if $(IMAGE),--release=$(IMAGE)) storagetm.pyz

demo: deps storagetm.pyz  ## Boot a target and a client, and show what the tool does; INTERACTIVE=1 to look for yourself
	INTERACTIVE=$(INTERACTIVE) $(VENV)/python -m tests.programs.demo

clean:  ## Remove what was built; the images in the cache stay
	rm -rf build storagetm.pyz .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -exec rm -rf {} +
