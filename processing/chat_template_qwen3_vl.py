"""The chat template, as text: a Hub folder is flat and copies only Python files.

Written for this package. It renders what the template published with Qwen3-VL-Instruct renders, for system, user,
assistant and tool turns, pictures, videos, `tools`, `add_vision_id` and `add_generation_prompt`. Beyond it: a message
whose content is `None` renders as an empty one, and assistant turns are marked with `{% generation %}`, so that
`apply_chat_template(..., return_assistant_tokens_mask=True)` works; the mark holds the closing `<|im_end|>`, which a
model must learn to write, and not the newline after it.

Source of the format: Qwen Team, model card and `chat_template.json` of Qwen/Qwen3-VL-8B-Instruct (2025).
"""

QWEN3_VL_CHAT_TEMPLATE = r"""
{%- set seen = namespace(pictures=0, videos=0) -%}

{%- macro words(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content if 'text' in part -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro words_and_media(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set seen.pictures = seen.pictures + 1 -%}
                {{- ('Picture ' ~ seen.pictures ~ ': ') if add_vision_id else '' -}}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {%- set seen.videos = seen.videos + 1 -%}
                {{- ('Video ' ~ seen.videos ~ ': ') if add_vision_id else '' -}}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- words([part]) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro call(tool_call) -%}
    {%- set function = tool_call.function or tool_call -%}
    {%- set arguments = function.arguments if function.arguments is string else function.arguments | tojson -%}
    {{- '<tool_call>\n{"name": "' ~ function.name ~ '", "arguments": ' ~ arguments ~ '}\n</tool_call>' -}}
{%- endmacro -%}

{%- set opening = messages[0] if messages and messages[0].role == 'system' else none -%}
{%- if tools or opening -%}
    {{- '<|im_start|>system\n' -}}
    {%- if opening -%}
        {{- words(opening.content) -}}
    {%- endif -%}
    {%- if tools -%}
        {{- '\n\n' if opening else '' -}}
        {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
        {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n' -}}
        {%- for tool in tools -%}
            {{- (tool | tojson) ~ '\n' -}}
        {%- endfor -%}
        {{- '</tools>\n\nFor each function call, return a json object with function name and arguments' -}}
        {{- ' within <tool_call></tool_call> XML tags:\n' -}}
        {{- '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}

{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<|im_start|>user\n' ~ words_and_media(message.content) ~ '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- generation -%}
            {{- words(message.content) -}}
            {%- for tool_call in message.tool_calls or [] -%}
                {{- '\n' if message.content or not loop.first else '' -}}
                {{- call(tool_call) -}}
            {%- endfor -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' -}}
        {{- '\n<tool_response>\n' ~ words_and_media(message.content) ~ '\n</tool_response>' -}}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
    {%- endif -%}
{%- endfor -%}

{{- '<|im_start|>assistant\n' if add_generation_prompt else '' -}}
""".strip()
