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

{{/* An image, pinned: a tag could be another image tomorrow. */}}
{{- define "safelight.image" -}}
{{ .repository }}@{{ .digest }}
{{- end }}

{{/* What Pod Security "restricted" asks of a container, and a root file system that nothing writes to. */}}
{{- define "safelight.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* The user of both images: both containers of a pod open each other's shared memory. */}}
{{- define "safelight.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* What a schema cannot say: values that need one another. */}}
{{- define "safelight.check" -}}
{{- $v := .Values }}
{{- if and (not $v.insecure) (or (not $v.tls.secret) (not $v.apiKeys.secret)) }}
{{- fail "give tls.secret and apiKeys.secret, or insecure: true" }}
{{- end }}
{{- if and (or $v.redis.url $v.redis.secret $v.cache.s3.url $v.cache.diskGiB) (not $v.cache.keySecret) }}
{{- fail "redis, cache.s3 and cache.diskGiB need cache.keySecret: everything kept there is sealed" }}
{{- end }}
{{- if and $v.redis.url $v.redis.secret }}
{{- fail "redis.url and redis.secret exclude each other" }}
{{- end }}
{{- if and (gt (int $v.replicas) 1) (not $v.redis.url) (not $v.redis.secret) }}
{{- fail "replicas above 1 need redis.url or redis.secret: without Redis a stream can only be resumed at its own replica" }}
{{- end }}
{{- if and (eq $v.runtime "triton") (not $v.triton.image.digest) }}
{{- fail "runtime: triton needs triton.image" }}
{{- end }}
{{- if and $v.models.url (not $v.models.sha256sums) }}
{{- fail "models.url needs models.sha256sums: no file is used whose digest is not given" }}
{{- end }}
{{- if and $v.route.enabled (not $v.route.parentRefs) }}
{{- fail "route.enabled needs route.parentRefs" }}
{{- end }}
{{- end }}
