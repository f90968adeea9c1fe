{{- define "safelight.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "safelight.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "safelight.labels" -}}
{{ include "safelight.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* An image pinned by its digest: a tag could be moved to another image. */}}
{{- define "safelight.image" -}}
{{ .repository }}@{{ .digest }}
{{- end }}

{{/* What Pod Security "restricted" demands of a container, and a read-only root file system. */}}
{{- define "safelight.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Gateway and Triton run as the same user, since each opens the shared memory of the other. */}}
{{- define "safelight.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Refuses values that contradict each other, which the schema cannot express. */}}
{{- define "safelight.check" -}}
{{- $v := .Values }}
{{- if and (not $v.insecure) (or (not $v.tls.secret) (and (not $v.apiKeys.secret) (not $v.settings.oidc_issuer))) }}
{{- fail "give tls.secret and apiKeys.secret (or settings.oidc_issuer), or insecure: true" }}
{{- end }}
{{- if and (or $v.redis.url $v.redis.secret $v.cache.s3.url $v.cache.diskGiB) (not $v.cache.keySecret) }}
{{- fail "redis, cache.s3 and cache.diskGiB need cache.keySecret: everything kept there is sealed" }}
{{- end }}
{{- if and $v.redis.url $v.redis.secret }}
{{- fail "redis.url and redis.secret exclude each other" }}
{{- end }}
{{- if and (not $v.scaling.enabled) (gt (int $v.replicas) 1) (not $v.redis.url) (not $v.redis.secret) }}
{{- fail "replicas above 1 need redis.url or redis.secret: without Redis a stream can only be resumed at its own replica" }}
{{- end }}
{{- if and (eq $v.runtime "triton") (not $v.triton.image.digest) }}
{{- fail "runtime: triton needs triton.image" }}
{{- end }}
{{- if and $v.models.url (not $v.models.sha256sums) }}
{{- fail "models.url needs models.sha256sums: no file is used whose digest is not given" }}
{{- end }}
{{- if and $v.tls.clientCaSecret (not $v.tls.secret) }}
{{- fail "tls.clientCaSecret needs tls.secret" }}
{{- end }}
{{- with $v.scaling }}
{{- if .enabled }}
{{- if or (not .prometheus) (not .scaler.image.digest) (not $v.ports.metrics) }}
{{- fail "scaling.enabled needs scaling.prometheus, scaling.scaler.image and ports.metrics" }}
{{- end }}
{{- if lt (int .maxReplicas) (int .minReplicas) }}
{{- fail "scaling.maxReplicas must be at least scaling.minReplicas" }}
{{- end }}
{{- if and (gt (int .maxReplicas) 1) (not $v.redis.url) (not $v.redis.secret) }}
{{- fail "scaling.maxReplicas above 1 needs redis.url or redis.secret: without Redis a stream can only be resumed at its own replica" }}
{{- end }}
{{- if and (eq (int .minReplicas) 0) $v.tls.clientCaSecret (not .activator.clientCertSecret) }}
{{- fail "scaling.minReplicas: 0 with tls.clientCaSecret needs scaling.activator.clientCertSecret: the replicas want a certificate of the activator too" }}
{{- end }}
{{- end }}
{{- end }}
{{- with $v.bills.archive }}
{{- if and .enabled (or (not .table) (not .image.repository) (not .image.digest)) }}
{{- fail "bills.archive.enabled needs bills.archive.table and bills.archive.image" }}
{{- end }}
{{- if and .enabled (gt (len (include "safelight.deployment" $)) 64) }}
{{- fail "bills.archive.deployment is needed: namespace and release make a name of more than 64 characters" }}
{{- end }}
{{- if and .enabled (not $v.redis.url) (not $v.redis.secret) }}
{{- fail "bills.archive.enabled needs redis.url or redis.secret: a replica without Redis writes no bills" }}
{{- end }}
{{- end }}
{{- if and $v.route.enabled (not $v.route.parentRefs) }}
{{- fail "route.enabled needs route.parentRefs" }}
{{- end }}
{{- if $v.networkPolicy.enabled }}
{{- with $v.networkPolicy }}
{{- if and (or $v.redis.url $v.redis.secret $v.cache.s3.url $v.models.url $v.otlp.endpoint $v.settings.oidc_issuer) (not .egressPorts) (not .egress) }}
{{- fail "redis, cache.s3, models.url, otlp and settings.oidc_issuer need networkPolicy.egressPorts or networkPolicy.egress: the pods call nobody else" }}
{{- end }}
{{- end }}
{{- if $v.route.enabled }}
{{- $outside := false }}
{{- range $v.networkPolicy.clients }}{{ if or .namespaceSelector .ipBlock }}{{ $outside = true }}{{ end }}{{ end }}
{{- range $v.route.parentRefs }}
{{- if and .namespace (ne .namespace $.Release.Namespace) (not $outside) }}
{{- fail (printf "the route's gateway is in the namespace %s: networkPolicy.clients must admit its pods, such as {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %s}}}" .namespace .namespace) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The label of the pods to which the service sends calls: the replicas and the activator. */}}
{{- define "safelight.entry" -}}
safelight/entry: {{ include "safelight.name" . }}
{{- end }}

{{/* Selector labels of a component that is not a replica. Call it with a list: (list . "scaler") or (list . "activator"). */}}
{{- define "safelight.besideSelector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}-{{ index . 1 }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- end }}

{{- define "safelight.besideLabels" -}}
{{- $root := index . 0 -}}
{{ include "safelight.besideSelector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{/* Pod spec of such a component: no token, no rights, on different nodes. It needs no GPU, so it has a nodeSelector of its own. */}}
{{- define "safelight.besidePod" -}}
{{- $root := index . 0 -}}
{{- $v := $root.Values -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- include "safelight.podSecurity" $root | nindent 2 }}
{{- with $v.image.pullSecrets }}
imagePullSecrets: {{- range . }}
  - name: {{ . }}{{ end }}
{{- end }}
{{- with $v.scaling.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - topologyKey: kubernetes.io/hostname
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "safelight.besideSelector" . | nindent 8 }}
{{- end }}

{{/* The name under which bills are kept in a table that other deployments may use too. */}}
{{- define "safelight.deployment" -}}
{{ .Values.bills.archive.deployment | default (printf "%s.%s" .Release.Namespace (include "safelight.name" .)) }}
{{- end }}

{{/* The port of a URL; the scheme's default if it names none. */}}
{{- define "safelight.portOf" -}}
{{- $host := (urlParse .).host -}}
{{- if regexMatch ":[0-9]+$" $host }}{{ regexFind "[0-9]+$" $host }}{{ else if hasPrefix "https:" . }}443{{ else }}80{{ end }}
{{- end }}

{{/* Peers that may call, beside what runs in the release itself: given none, only the pod of `helm test`. An empty list in a
policy would admit everybody. */}}
{{- define "safelight.clients" -}}
{{- with .Values.networkPolicy.clients }}{{ toYaml . }}{{ end }}
- podSelector:
    matchLabels: {{- include "safelight.besideSelector" (list . "test") | nindent 6 }}
{{- end }}
