# Each target is one line that calls the real thing. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help build demo node test test-all test-kubernetes bench fuzz mutate install uninstall deb installer

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

build: ## build the guest kernel, the initramfs and the host binaries for a node
	./build

demo: ## boot a throw-away worker node and show a container in its own microVM
	tests/demo

node: ## a shell in a throw-away worker node with the freshly built binaries
	tests/node/node shell

test: ## the whole gate: format, lints, licences, unit, component and end-to-end tests
	tests/gate

test-all: ## the long matrix: every containerd, every case
	tests/gate --all

test-kubernetes: ## pods of a real Kubernetes; builds one from Debian's source first (15 minutes, once)
	tests/kubernetes/run

bench: ## tables and JSON: boot, start, memory, exits, against QEMU microvm and runc
	tests/run --bench

fuzz: ## property tests (CASES=…), then each fuzz target under coverage guidance (SECONDS=…)
	tests/fuzz --cases $(or $(CASES),20000) --seconds $(or $(SECONDS),60)

mutate: ## break Brig on purpose, one thing at a time: a test fails for each
	tests/mutate

install: ## install the binaries and the guest under $(PREFIX), default /opt/brig
	./install $(PREFIX)

deb: ## a Debian package in target/deb
	deploy/debian/build

installer: ## an image and its DaemonSet in target/installer, which install Brig on the nodes of a cluster
	deploy/installer/build

uninstall: ## remove what install put there
	./install --remove $(PREFIX)
