# Everything a developer or CI does. `make help` lists the targets; times are those of two cores.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PY := .venv/bin/python
TRAIN_PY := .venv-training/bin/python
TRITON_PY := .venv-triton/bin/python

# Compiled modules are kept, whatever the shell says: a server that a test starts imports in half of the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## List the targets, and how long each takes
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

.venv/.uv:
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check uv
	@touch $@

.venv/.installed: .venv/.uv requirements-dev.lock
	.venv/bin/uv pip sync --quiet --python $(PY) --require-hashes requirements-dev.lock
	.venv/bin/uv pip install --quiet --python $(PY) --no-deps --no-build-isolation -e clients/python -e .
	@touch $@

.venv-training/.installed: .venv/.uv requirements-training.lock
	python3 -m venv .venv-training
	.venv/bin/uv pip sync --quiet --python $(TRAIN_PY) --require-hashes requirements-training.lock
	@touch $@

.venv-locust/.installed: .venv/.uv requirements-locust.lock
	python3 -m venv .venv-locust
	.venv/bin/uv pip sync --quiet --python .venv-locust/bin/python --require-hashes requirements-locust.lock
	@touch $@

.venv-triton/.installed: .venv/.uv requirements-triton.lock
	python3 -m venv .venv-triton
	.venv/bin/uv pip sync --quiet --python $(TRITON_PY) --require-hashes requirements-triton.lock
	@touch $@

.tools/.installed: tools/go.mod tools/go.sum
	cd tools && go build -o ../.tools/ tool
	@touch $@

.tools/helm: tools/helm/go.mod tools/helm/go.sum
	cd tools/helm && go build -trimpath -ldflags '-s -w' -o ../../.tools/ tool
	@touch $@

.tools/kubernetes/.installed: tools/kubernetes/go.mod tools/kubernetes/go.sum tools/coredns/go.mod tools/coredns/main.go
	cd tools/kubernetes && go build -trimpath -ldflags '-s -w -X k8s.io/component-base/version.gitVersion=v1.33.4' \
	  -o ../../.tools/kubernetes/ tool
	cd tools/coredns && go build -trimpath -ldflags '-s -w' -o ../../.tools/kubernetes/ .
	@touch $@

.tools/kubernetes/kube-router: tools/kube-router/go.mod tools/kube-router/go.sum
	cd tools/kube-router && go build -trimpath -ldflags '-s -w' -o ../../.tools/kubernetes/ tool

# KEDA by its own go.mod; tools/keda/go.sum says that its source is the one that was tried.
.tools/kubernetes/keda/.installed: tools/keda/go.mod tools/keda/go.sum tools/keda/without_scalers.py
	python3 tools/keda/without_scalers.py "$$(cd tools/keda && go mod download -json github.com/kedacore/keda/v2 | \
	  sed -n 's/.*"Dir": "\(.*\)",/\1/p')" .tools/kubernetes/keda/source
	cd .tools/kubernetes/keda/source && go build -trimpath -ldflags '-s -w' -o .. ./cmd/operator ./cmd/adapter
	@touch $@

.tools/protoc-gen-go-grpc: tools/install-protoc-plugins
	tools/install-protoc-plugins

.tools/safelight-generate: tools/install-rust-generator clients/rust/generate/Cargo.toml clients/rust/generate/src/main.rs
	tools/install-rust-generator

.PHONY: setup
setup: .venv/.installed ## Make the virtual environment from the lock file (10 s)

.PHONY: demo
demo: setup ## Develop several pictures at once and write them to out/demo
	.venv/bin/safelight demo

.PHONY: serve
serve: setup ## Run the server in the foreground
	.venv/bin/safelight serve

.PHONY: triton
triton: .venv-triton/.installed ## Serve models/repository with a real tritonserver (SERVE_ARGS="--grpc-port 8001 ...")
	$(TRITON_PY) deploy/triton/serve $(SERVE_ARGS)

.PHONY: tools
tools: .tools/.installed ## Build ghz, grpcurl and Jaeger with Go (3 min, once)

.PHONY: jaeger
jaeger: .tools/.installed ## Run Jaeger in the foreground: OTLP on 4317 and 4318, its page and queries on 16686
	tools/jaeger

.PHONY: test
test: setup ## Run the tests that need nothing but the virtual environment (4 to 9 min)
	$(PY) -m pytest -q tests/unit tests/integration

.PHONY: test-training
test-training: .venv-training/.installed ## Run the tests against torch and diffusers (8 min, in two processes)
	$(TRAIN_PY) -m pytest -q -p no:cacheprovider -W ignore::DeprecationWarning -W ignore::FutureWarning \
	  -W ignore::UserWarning --timeout 600 -n 2 --dist loadfile tests/training  # warnings of torch and diffusers are not ours to mend

.PHONY: test-peers
test-peers: .venv-training/.installed ## Run the tests of the latency benchmark, with its peers (1 min)
	PYTHONPATH=server:clients/python:. $(TRAIN_PY) -m pytest -q -p no:cacheprovider --timeout 400 tests/peers

.PHONY: test-redis
test-redis: setup ## Run the tests against a real Redis and an S3 server, which they start themselves (4 min)
	tools/install-system-packages
	$(PY) -m pytest -q --timeout 120 tests/redis

.PHONY: test-triton
test-triton: setup .venv-triton/.installed .tools/.installed ## Run the tests against the real tritonserver (5 min)
	$(PY) -m pytest -q --timeout 180 tests/triton

.PHONY: test-tools
test-tools: setup .tools/.installed .venv-locust/.installed node_modules/.installed ## Run the tests with grpcurl, ghz, locust, Jaeger and Node (2 min)
	$(PY) -m pytest -q --timeout 180 tests/tools

.PHONY: test-browser
test-browser: setup node_modules/.installed ## Run the tests of the contact sheet in Debian's Chromium (1 min)
	tools/install-system-packages
	$(PY) -m pytest -q --timeout 120 tests/browser

.PHONY: test-watching
test-watching: setup ## Run the tests of rules, alerts and dashboards against a real Prometheus, and Triton where it is (1 min)
	tools/install-system-packages
	$(PY) -m pytest -q --timeout 120 tests/watching

.PHONY: build-clients
build-clients: setup node_modules/.installed ## Build what test-clients runs, which it does by itself where this was not done (10 min beside tests)
	tools/install-system-packages
	PYTHONPATH=clients/python:. $(PY) -m tools.clients

# Side by side: the cases wait for most of their time, the other tests compile and compute.
CASES := tests/clients/test_conformance.py
.PHONY: test-clients
test-clients: build-clients ## Run the clients of all languages whose toolchains are here against real servers (3 min, once built)
	mkdir -p out
	nice $(PY) -m pytest -q --timeout 400 tests/clients --ignore $(CASES) >out/test-clients.log 2>&1 & others=$$!; \
	  $(PY) -m pytest -q --timeout 180 $(CASES); cases=$$?; \
	  wait $$others; others=$$?; cat out/test-clients.log; exit $$((cases + others))

.PHONY: test-bevy
test-bevy: setup ## Run the Bevy plugin against a real server, rendering in software (6 min, of which 5 compile Bevy; not in CI)
	tools/install-system-packages bevy
	$(PY) -m pytest -q --timeout 180 tests/bevy

.PHONY: test-engines
test-engines: setup ## Run the C client in GStreamer, in LÖVE and in an SDL2 program, headless (1 min)
	tools/install-system-packages cpp engines
	$(PY) -m pytest -q --timeout 400 tests/engines

.PHONY: blender-addon
PLATFORM := linux
PYTHON_VERSION := 3.11
blender-addon: setup ## Pack the Blender add-on into out/blender (seconds; PLATFORM=linux, windows or macos; PYTHON_VERSION=3.11, that of Blender)
	$(PY) tools/blender_addon.py --platform $(PLATFORM) --python-version $(PYTHON_VERSION)

.PHONY: test-blender
test-blender: setup ## Run the add-on in Debian's Blender, also in its window on a virtual screen (2 min; downloads 170 MB of packages: not in CI)
	tools/install-system-packages blender
	$(PY) -m pytest -q --timeout 180 tests/blender

# In a network namespace of its own: compose.yaml's ports stay as they are, and nothing is reached from outside.
.PHONY: test-deploy
test-deploy: setup .tools/.installed .tools/helm .venv-triton/.installed ## Check the chart's profiles and compose.yaml, whose commands are run (1 min)
	tools/install-system-packages
	unshare --net bash -c 'ip link set lo up && SAFELIGHT_TEST_NETWORK=unshared exec $(PY) -m pytest -q --timeout 120 tests/deploy'

# Without terraform and its provider what needs them is skipped; CONTRIBUTING.md says how they are found.
.PHONY: test-cloud
test-cloud: setup .tools/helm ## Apply deploy/terraform and deploy/cloudformation to moto, and find what is changed by hand (4 min; not in CI)
	$(PY) -m pytest -q --timeout 600 tests/cloud

.PHONY: image
image: setup ## Build the images `gateway` and `triton` with buildah, and their bills of material (3 min; needs root)
	tools/install-system-packages images
	deploy/image/build

.PHONY: test-image
test-image: image ## Run the images with podman and develop a picture in them (4 min with `image`)
	$(PY) -m pytest -q tests/image

# In network, mount and process namespaces of its own: when make ends, nothing of the cluster is left.
.PHONY: test-kubernetes
KUBERNETES_TESTS := tests/kubernetes
test-kubernetes: image .tools/helm .tools/kubernetes/.installed .tools/kubernetes/kube-router .tools/kubernetes/keda/.installed ## Install, upgrade, drain, kill, scale and shut off on a real cluster (first 40 min of Go, then 20; needs root; KUBERNETES_TESTS=one file)
	tools/install-system-packages kubernetes
	deploy/image/build scaler archiver
	cd tools/kubernetes && go mod download sigs.k8s.io/gateway-api@v1.3.0  # the tests have no network
	deploy/image/pack out/image/gateway.tar out/image/triton.tar out/image/scaler.tar out/image/archiver.tar
	SAFELIGHT_TEST_CLUSTER=unshared unshare --net --mount --pid --fork --kill-child --mount-proc catatonit -- \
	  $(PY) -m pytest -q -s $(KUBERNETES_TESTS)

.PHONY: test-simulation
SCHEDULES := 100000
SEED := 1
test-simulation: setup ## Run fleets of replicas on a virtual clock, from seeds (SCHEDULES=100000 SEED=1; 7 min on two cores)
	PYTHONPATH=server:clients/python:. $(PY) -m tests.simulation --schedules $(SCHEDULES) --seed $(SEED)

.PHONY: test-rest
test-rest: test-tools test-browser test-watching test-clients test-engines test-redis test-triton test-training test-peers test-simulation mutate ## Run the groups that need more than `make test` does (45 min)

.PHONY: test-all
test-all: test test-rest ## Run all tests (1 h)

.PHONY: check
check: setup .tools/protoc-gen-go-grpc .tools/safelight-generate node_modules/.installed ## Format, lint, types, import rules, generated code, mutations apply, proto lint (1 min)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	tools/check-generated
	tools/check-mutations
	$(MAKE) --no-print-directory buf
	.venv/bin/hadolint Dockerfile

.PHONY: format
format: setup ## Format the sources
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

.PHONY: generate
generate: setup .tools/protoc-gen-go-grpc .tools/safelight-generate node_modules/.installed ## Generate the stubs of all clients and the page's field numbers from proto/, and the settings page
	tools/generate-stubs .
	$(PY) tools/settings_page.py > docs/operations/settings.md
	$(PY) tools/chart_files.py
	PYTHONPATH=. $(PY) -m tools.dashboards deploy/grafana
	$(PY) tools/page_messages.py > server/safelight_server/http/page/messages.js

node_modules/.installed: package.json package-lock.json
	npm ci --silent --no-fund --no-audit
	@touch $@

.PHONY: buf
buf: node_modules/.installed ## Lint the proto; refuse breaking changes against main
	npx --no-install buf lint
	tools/check-breaking

.PHONY: lock
lock: .venv/.uv ## Pin all dependencies anew
	.venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --no-emit-package safelight \
	  pyproject.toml clients/python/pyproject.toml -o requirements.lock
	.venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --no-emit-package safelight \
	  pyproject.toml clients/python/pyproject.toml --extra dev -c requirements.lock -o requirements-dev.lock
	.venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --no-emit-package safelight \
	  pyproject.toml clients/python/pyproject.toml --extra training -c requirements.lock -o requirements-training.lock
	.venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --no-emit-package safelight \
	  pyproject.toml clients/python/pyproject.toml --extra scaler -c requirements-dev.lock -o requirements-scaler.lock
	.venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --no-emit-package safelight \
	  pyproject.toml clients/python/pyproject.toml --extra aws -c requirements-dev.lock -o requirements-aws.lock
	.venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
	  deploy/triton/requirements.in -o requirements-triton.lock
	.venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
	  --group build -c requirements-dev.lock -o requirements-build.lock
	.venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
	  --group docs -c requirements-dev.lock -o requirements-docs.lock
	.venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
	  --group locust -c requirements-dev.lock -o requirements-locust.lock
	.venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --universal --no-emit-package safelight \
	  clients/python/pyproject.toml -c requirements.lock -o requirements-blender.lock

.PHONY: mutate
mutate: setup ## Break each rule once and see its test fail (ONLY=part of a name; 7 to 11 min)
	tools/install-system-packages
	$(PY) tools/mutate.py $(ONLY)

# Only latency (its peers), cheaper (its judge) and kinds (exports) need torch; only two parts need Triton, one Redis.
comma := ,
PARTS := $(subst $(comma), ,$(ONLY))
BENCH_ENV := $(if $(filter latency cheaper kinds,$(or $(PARTS),latency)),.venv-training,.venv)
BENCH_TRITON := $(if $(filter triton merging,$(or $(PARTS),triton)),.venv-triton/.installed)
BENCH_REDIS := $(if $(filter tiers,$(or $(PARTS),tiers)),tools/install-system-packages)
BENCH_CLIENTS := $(if $(filter clients,$(or $(PARTS),clients)),node_modules/.installed)
.PHONY: bench
bench: setup $(BENCH_ENV)/.installed $(BENCH_TRITON) $(BENCH_CLIENTS) ## Measure: tables, and JSON in out/bench. ONLY=parts of docs/benchmarks.md, with commas (minutes a part)
	$(BENCH_REDIS)
	PYTHONPATH=server:clients/python $(BENCH_ENV)/bin/python -m load_tests.bench --only "$(ONLY)"

.PHONY: record
record: setup ## Record the contact sheet for the README, from a real browser (1 min)
	PYTHONPATH=server:clients/python $(PY) tools/record_page.py

.PHONY: soak
soak: setup ## Good callers beside hostile ones for MINUTES=30; memory must stay flat (30 min)
	PYTHONPATH=server:clients/python $(PY) -m load_tests.soak --minutes $(or $(MINUTES),30)

.PHONY: bench-smoke
bench-smoke: setup .venv-training/.installed .venv-triton/.installed ## Run all benchmarks for seconds, to see that they work (minutes)
	tools/install-system-packages
	PYTHONPATH=server:clients/python $(TRAIN_PY) -m load_tests.bench --smoke --out out/bench/smoke

.PHONY: train
train: .venv-training/.installed ## Train the embedded model from a seed (says how long it takes; resumes)
	$(TRAIN_PY) -m training.train
	PYTHONPATH=server:clients/python $(TRAIN_PY) -m safelight_server export out/training/pipeline --name icons --revision trained \
	  --licence Apache-2.0 --description "Game item icons from plain words" --steps 20 --guidance-scale 3 \
	  --models-dir out/training/models --replace
	PYTHONPATH=server $(TRAIN_PY) -m training.evaluate --models out/training/models

# icons again as a folder of diffusers, with its weights; and its denoiser with room for adapters, in a folder of its own.
out/restored/icons: .venv-training/.installed
	PYTHONPATH=server $(TRAIN_PY) -W ignore -m training.restore --out $@

out/lora/models: out/restored/icons
	rm -rf $@ $@.partial
	PYTHONPATH=server:clients/python $(TRAIN_PY) -W ignore -m safelight_server export out/restored/icons --name icons \
	  --revision 1.0-adapters --licence Apache-2.0 --description "Game item icons from plain words" --steps 20 \
	  --guidance-scale 3 --adapter-rank 8 --adapter-layers all --no-text-adapters --models-dir $@.partial
	mv $@.partial $@

.PHONY: demo-lora
demo-lora: setup out/lora/models ## Develop pictures of icons without and with the adapter `neon`, into out/demo-lora (2 min, the first time)
	SAFELIGHT_ADAPTERS_DIR=models/adapters .venv/bin/safelight demo --models-dir out/lora/models --adapter neon --out out/demo-lora

.PHONY: train-lora
train-lora: out/lora/models ## Train the adapter `neon` of icons from 200 drawings, and score it (minutes; resumes; LORA_ARGS="--measure")
	PYTHONPATH=server $(TRAIN_PY) -W ignore -m training.lora $(LORA_ARGS)
	[ "$(LORA_ARGS)" = --measure ] || PYTHONPATH=server $(TRAIN_PY) -W ignore -m training.style --adapter out/lora/neon --card

.PHONY: evaluate
evaluate: .venv-training/.installed ## Score the shipped weights; fails below the bars
	PYTHONPATH=server $(TRAIN_PY) -m training.evaluate

.PHONY: clean
clean: ## Remove what was built and measured
	rm -rf .venv .venv-training .venv-triton .venv-docs .venv-locust .tools node_modules tools/site/node_modules out

.venv-docs/.installed: .venv/.uv requirements-docs.lock
	python3 -m venv .venv-docs
	.venv/bin/uv pip sync --quiet --python .venv-docs/bin/python --require-hashes requirements-docs.lock
	@touch $@

tools/site/node_modules/.installed: tools/site/package.json tools/site/package-lock.json
	cd tools/site && npm ci --silent --no-fund --no-audit
	@touch $@

.PHONY: docs
docs: .venv-docs/.installed tools/site/node_modules/.installed ## Build the documentation site into out/site; a dead link fails (seconds)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.PHONY: test-examples
test-examples: setup ## Run the examples (a minute; the one with Redis needs redis-server)
	tools/install-system-packages
	$(PY) -m pytest -q --timeout 120 tests/integration/test_examples.py tests/redis/test_examples.py

.PHONY: bench-server
bench-server: setup ## Put load on a running server and print what its clients see (BENCH_ARGS="--target HOST:PORT ...")
	$(PY) -m load_tests.bench.running_server $(BENCH_ARGS)

.PHONY: ghz
ghz: setup .tools/.installed ## Run the scenarios of docs/load-testing.md on a running server (8 min; GHZ_ARGS="--time-scale 0.1 ...")
	$(PY) -m load_tests.ghz.run $(GHZ_ARGS)

.PHONY: locust
locust: .venv-locust/.installed ## Let users ask a running server until Ctrl-C (LOCUST_ARGS="--users 8 --run-time 60s ...")
	PYTHONPATH=clients/python:. .venv-locust/bin/locust -f load_tests/locust/locustfile.py --headless $(LOCUST_ARGS)
