{{/* The Redis of the replicas, and the file with the keys that seal what they keep. */}}
{{- define "safelight.redisEnvironment" -}}
{{- $v := .Values -}}
{{- if $v.redis.url }}
- {name: SAFELIGHT_REDIS_URL, value: {{ $v.redis.url | quote }}}
{{- else if $v.redis.secret }}
- name: SAFELIGHT_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ $v.redis.secret }}, key: {{ $v.redis.key }}}}
{{- end }}
{{- if $v.cache.keySecret }}
- {name: SAFELIGHT_CACHE_KEY_FILE, value: {{ print "/etc/safelight/cache-key/" $v.cache.keySecretKey | quote }}}
{{- end }}
{{- end }}

{{/* Environment variables with the server's settings (docs/operations/settings.md). */}}
{{- define "safelight.environment" -}}
{{- $v := .Values -}}
- {name: SAFELIGHT_HOST, value: 0.0.0.0}
- {name: SAFELIGHT_PORT, value: {{ $v.ports.grpc | quote }}}
- {name: SAFELIGHT_PROBE_PORT, value: {{ $v.ports.probe | quote }}}
- {name: SAFELIGHT_HTTP_PORT, value: {{ $v.ports.http | quote }}}
- {name: SAFELIGHT_METRICS_PORT, value: {{ $v.ports.metrics | quote }}}
- {name: SAFELIGHT_METRICS_HOST, value: 0.0.0.0}
- {name: SAFELIGHT_INSECURE, value: {{ $v.insecure | quote }}}
- {name: SAFELIGHT_DRAIN_GRACE_S, value: {{ $v.drainSeconds | quote }}}
- {name: SAFELIGHT_RUNTIME, value: {{ $v.runtime }}}
{{- if eq $v.runtime "triton" }}
- {name: SAFELIGHT_TRITON_URL, value: "127.0.0.1:8001"}
- {name: SAFELIGHT_TRITON_SHARED_MEMORY, value: "on"}
- {name: SAFELIGHT_TRITON_INSTANCES, value: {{ $v.triton.calls | quote }}}
{{- else }}
# One instance for each core that the container requests. By default it would be one for each core of the node.
- name: SAFELIGHT_NUM_INSTANCES
  valueFrom: {resourceFieldRef: {containerName: gateway, resource: requests.cpu, divisor: "1"}}
{{- end }}
{{- if $v.tls.secret }}
- {name: SAFELIGHT_TLS_CERT_FILE, value: /etc/safelight/tls/tls.crt}
- {name: SAFELIGHT_TLS_KEY_FILE, value: /etc/safelight/tls/tls.key}
{{- end }}
{{- if $v.tls.clientCaSecret }}
- {name: SAFELIGHT_TLS_CLIENT_CA_FILE, value: {{ print "/etc/safelight/client-ca/" $v.tls.clientCaSecretKey | quote }}}
{{- end }}
{{- if $v.apiKeys.secret }}
- {name: SAFELIGHT_API_KEY_FILE, value: {{ print "/etc/safelight/api-keys/" $v.apiKeys.key | quote }}}
{{- end }}
{{- if $v.quotas }}
- {name: SAFELIGHT_QUOTA_FILE, value: /etc/safelight/files/quotas.json}
{{- end }}
{{- include "safelight.redisEnvironment" . }}
{{- if $v.cache.diskGiB }}
- {name: SAFELIGHT_CACHE_DISK_DIR, value: /var/cache/safelight/entries}
- {name: SAFELIGHT_CACHE_DISK_BYTES, value: {{ mul $v.cache.diskGiB 1073741824 | quote }}}
{{- end }}
{{- with $v.cache.s3 }}
{{- if .url }}
{{- $options := list (print "region=" (urlquery .region)) }}
{{- with .endpoint }}{{ $options = append $options (print "endpoint_url=" (urlquery .)) }}{{ end }}
{{- if .credentialsSecret }}{{ $options = append $options (print "credentials_file=/etc/safelight/s3/" .credentialsSecretKey) }}{{ end }}
- {name: SAFELIGHT_CACHE_S3_URL, value: {{ print .url "?" (join "&" $options) | quote }}}
{{- end }}
{{- end }}
{{- with $v.otlp }}
{{- if .endpoint }}
- {name: SAFELIGHT_OTLP_ENDPOINT, value: {{ .endpoint | quote }}}
{{- if .headersSecret }}
- name: SAFELIGHT_OTLP_HEADERS
  valueFrom: {secretKeyRef: {name: {{ .headersSecret }}, key: {{ .headersSecretKey }}}}
{{- end }}
{{- end }}
{{- end }}
{{- range $setting, $value := $v.settings }}
- {name: SAFELIGHT_{{ $setting | upper }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- end }}
