{{- define "expertd.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "expertd.selector" -}}
app.kubernetes.io/name: expertd
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "expertd.labels" -}}
{{ include "expertd.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* The experts of every shard, separated by spaces. */}}
{{- define "expertd.ranges" -}}
{{- if .Values.experts -}}
{{ join " " .Values.experts }}
{{- else -}}
{{- $shards := int .Values.shards -}}
{{- $experts := int .Values.model.experts -}}
{{- if mod $experts $shards -}}
{{ fail (printf "model.experts %d cannot be split evenly over shards %d; give the list experts" $experts $shards) }}
{{- end -}}
{{- $size := div $experts $shards -}}
{{- range $shard := until $shards -}}
{{ if $shard }} {{ end }}{{ mul $shard $size }}-{{ sub (mul (add1 $shard) $size) 1 }}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "expertd.shards" -}}
{{ include "expertd.ranges" . | splitList " " | len }}
{{- end }}

{{- define "expertd.probe" -}}
{{- if .Values.tls.secretName -}}
# Kubernetes' own gRPC probe knows no TLS.
exec:
  command:
    - expertd
    - health
    - 127.0.0.1:50051
    - --timeout=8
    - --tls-ca=/tls/ca.crt
    {{- with .Values.tls.serverName }}
    - --server-name={{ . }}
    {{- end }}
    {{- if .Values.tls.clientAuthority }}
    - --tls-client-cert=/tls/tls.crt
    - --tls-client-key=/tls/tls.key
    {{- end }}
{{- else -}}
grpc: {port: 50051}
{{- end }}
timeoutSeconds: 10
{{- end }}
