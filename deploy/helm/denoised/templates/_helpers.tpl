{{- define "denoised.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "denoised.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "denoised.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "denoised.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "denoised.selector" -}}
app.kubernetes.io/name: {{ include "denoised.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "denoised.labels" -}}
{{ include "denoised.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "denoised.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "denoised.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "denoised.tlsSecret" -}}
{{- default (printf "%s-tls" (include "denoised.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{/* The settings of one pool as TOML: the chart's own, then everybody's, then the pool's. Takes root and pool. */}}
{{- define "denoised.settings" -}}
{{- $root := .root -}}
{{- $own := dict
    "address" (printf "0.0.0.0:%d" (int $root.Values.service.port))
    "metrics_address" (printf "0.0.0.0:%d" (int $root.Values.metrics.port))
    "state_dir" "/var/lib/denoised"
    "drain_grace" (int $root.Values.drainGraceSeconds)
    "device" (ternary "cuda" "cpu" (gt (int .pool.gpus) 0)) -}}
{{- if $root.Values.tls.enabled -}}
{{- $_ := set $own "tls_cert" "/etc/denoised/tls/tls.crt" -}}
{{- $_ := set $own "tls_key" "/etc/denoised/tls/tls.key" -}}
{{- if $root.Values.tls.mutual -}}
{{- $_ := set $own "tls_client_ca" "/etc/denoised/tls/ca.crt" -}}
{{- end -}}
{{- else -}}
{{- $_ := set $own "insecure" true -}}
{{- end -}}
{{- $preload := list -}}
{{- range $each := concat $root.Values.preloads (default list .pool.preloads) -}}
{{- $text := printf "%s,id=%s" $each.repo $each.id -}}
{{- range $field := list "task" "dtype" "revision" "variant" -}}
{{- with get $each $field -}}{{- $text = printf "%s,%s=%s" $text $field . -}}{{- end -}}
{{- end -}}
{{- $preload = append $preload $text -}}
{{- end -}}
{{- if $preload -}}
{{- $_ := set $own "preload" $preload -}}
{{- $_ := set $own "readiness_probe" $root.Values.readinessProbe -}}
{{- end -}}
{{- if $root.Values.tokens.existingSecret -}}
{{- $_ := set $own "tokens_file" "/etc/denoised/tokens/tokens" -}}
{{- end -}}
{{- $settings := mergeOverwrite (dict) (deepCopy $root.Values.settings) (deepCopy (default dict .pool.settings)) $own -}}
{{- range $name := keys $settings | sortAlpha }}
{{ $name }} = {{ get $settings $name | toJson }}
{{- end -}}
{{- end -}}
