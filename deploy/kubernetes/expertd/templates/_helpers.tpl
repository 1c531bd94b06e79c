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

{{- define "expertd.image" -}}
{{- if .Values.image.digest -}}
{{ printf "%s@%s" .Values.image.repository .Values.image.digest | quote }}
{{- else -}}
{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
{{- end -}}
{{- end }}

{{- define "expertd.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "expertd.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* A container that gives a folder of the node to the servers' user, and may do nothing else. */}}
{{- define "expertd.owner" -}}
image: {{ include "expertd.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: [chown, "10001:10001", {{ .folder }}]
securityContext:
  runAsNonRoot: false
  runAsUser: 0
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL], add: [CHOWN]}
{{- end }}

{{/* Containers that run MPS for the pod's GPU from before the server starts until after it ends. */}}
{{- define "expertd.mps" -}}
- name: own-mps
  {{- include "expertd.owner" (dict "root" . "folder" "/mps") | nindent 2 }}
  env:
    {{- include "expertd.mpsEnv" . | nindent 4 }}
  volumeMounts:
    {{- include "expertd.mpsMount" . | nindent 4 }}
- name: mps
  image: {{ include "expertd.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  restartPolicy: Always
  command: [dumb-init, --single-child, --, nvidia-cuda-mps-control, -f]
  env:
    {{- include "expertd.mpsEnv" . | nindent 4 }}
    - {name: CUDA_MPS_LOG_DIRECTORY, value: /tmp}
    {{- if not .Values.resources.claims }}
    # The device plugin gives the pod's GPU to one container alone, which is the server.
    - {name: NVIDIA_VISIBLE_DEVICES, value: all}
    {{- end }}
  startupProbe:
    exec: {command: [sh, -c, "echo get_server_list | nvidia-cuda-mps-control"]}
    periodSeconds: 1
    timeoutSeconds: 5
    failureThreshold: 60
  resources:
    requests: {cpu: 100m, memory: 256Mi}
    {{- with .Values.resources.claims }}
    claims: {{- toYaml . | nindent 6 }}
    {{- end }}
  securityContext: {{- include "expertd.security" . | nindent 4 }}
  volumeMounts:
    {{- include "expertd.mpsMount" . | nindent 4 }}
    - {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "expertd.mpsEnv" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- {name: CUDA_MPS_PIPE_DIRECTORY, value: /mps}
{{- end }}

{{- define "expertd.mpsMount" -}}
- {name: mps, mountPath: /mps, subPathExpr: $(POD_NAME)}
{{- end }}

{{- define "expertd.secretMounts" -}}
{{- if .Values.tls.secretName }}
- {name: tls, mountPath: /tls, readOnly: true}
{{- end }}
{{- if .Values.tokenSecretName }}
- {name: tokens, mountPath: /tokens, readOnly: true}
{{- end }}
{{- end }}

{{- define "expertd.secretVolumes" -}}
{{- with .Values.tls.secretName }}
- name: tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .Values.tokenSecretName }}
- name: tokens
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "expertd.adminVolume" -}}
- name: admin
  secret: {secretName: {{ .Values.rebalance.adminTokenSecretName }}, defaultMode: 0440}
{{- end }}

{{/* Options of commands that call the servers. */}}
{{- define "expertd.clientOptions" -}}
{{- if .Values.tls.secretName -}}
- --tls-ca=/tls/ca.crt
{{- with .Values.tls.serverName }}
- --server-name={{ . }}
{{- end }}
{{- if .Values.tls.clientAuthority }}
- --tls-client-cert=/tls/tls.crt
- --tls-client-key=/tls/tls.key
{{- end }}
{{- end }}
{{- if .Values.tokenSecretName }}
- --auth-token-file=/tokens/tokens
{{- if .Values.insecure }}
- --insecure
{{- end }}
{{- end }}
{{- end }}

{{/* The servers as coordinators call them, one a line. */}}
{{- define "expertd.servers" -}}
{{- $name := include "expertd.name" . -}}
{{- range $shard, $experts := splitList " " (include "expertd.ranges" .) }}
{{- range $replica := until (int $.Values.replicasPerShard) }}
- {{ $name }}-shard-{{ $shard }}-{{ $replica }}.{{ $name }}.{{ $.Release.Namespace }}.svc:50051
{{- end }}
{{- end }}
{{- end }}

{{/* How many experts the shards own together. */}}
{{- define "expertd.expected" -}}
{{- $owned := dict -}}
{{- range $experts := splitList " " (include "expertd.ranges" .) -}}
{{- range $range := splitList "," $experts -}}
{{- $ends := splitList "-" $range -}}
{{- range $expert := untilStep (int (first $ends)) (int (add1 (last $ends))) 1 -}}
{{- $_ := set $owned (toString $expert) true -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{ len $owned }}
{{- end }}

{{/* Of pods that call the servers, and are none. */}}
{{- define "expertd.checkLabels" -}}
app.kubernetes.io/name: expertd-check
app.kubernetes.io/instance: {{ .Release.Name }}
{{- with .Values.checkLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Of pods that change what servers own. */}}
{{- define "expertd.rebalanceLabels" -}}
{{ include "expertd.checkLabels" . }}
expertd.rebalance: {{ .Release.Name | quote }}
{{- end }}
