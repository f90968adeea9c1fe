using System;
using System.Runtime.InteropServices;
using System.Text;

namespace Safelight
{
    /// <summary>The functions of safelight.h, by their C names. A test compares them with the header.</summary>
    internal static class Native
    {
        /// <summary>The system finds it as libsafelight.so, libsafelight.dylib or safelight.dll.</summary>
        private const string Library = "safelight";

        private const CallingConvention C = CallingConvention.Cdecl;

        /// <summary>The version of safelight.h from which these declarations come.</summary>
        internal const uint AbiVersion = 0x00010002;

        [DllImport(Library, CallingConvention = C)] internal static extern uint safelight_abi_version();

        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_error_code(IntPtr error);
        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_error_code_name(IntPtr error);
        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_error_reason(IntPtr error);
        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_error_message(IntPtr error);
        [DllImport(Library, CallingConvention = C)] internal static extern double safelight_error_retry_after_s(IntPtr error);
        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_error_num_violations(IntPtr error);
        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_error_violation_field(IntPtr error, int index);
        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_error_violation_description(IntPtr error, int index);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_error_free(IntPtr error);

        [DllImport(Library, CallingConvention = C)] internal static extern OptionsHandle safelight_options_new();
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_options_set_api_key(OptionsHandle options, byte[] api_key);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_options_set_tls(OptionsHandle options, byte[] ca_pem, byte[] server_name);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_options_set_certificate(OptionsHandle options, byte[] certificate_pem, byte[] key_pem);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_options_set_patience_s(OptionsHandle options, double patience_s);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_options_set_retries(OptionsHandle options, int retries);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_options_set_max_message_bytes(OptionsHandle options, int num_bytes);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_options_free(IntPtr options);

        [DllImport(Library, CallingConvention = C)] internal static extern ClientHandle safelight_client_new(byte[] target, OptionsHandle options, out ErrorHandle error);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_client_free(IntPtr client);
        [DllImport(Library, CallingConvention = C)] internal static extern TextHandle safelight_client_models(ClientHandle client, out ErrorHandle error);
        [DllImport(Library, CallingConvention = C)] internal static extern TextHandle safelight_client_get(ClientHandle client, byte[] generation, out ErrorHandle error);
        [DllImport(Library, CallingConvention = C)] internal static extern TextHandle safelight_client_cancel(ClientHandle client, byte[] generation, out ErrorHandle error);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_text_free(IntPtr text);
        [DllImport(Library, CallingConvention = C)] internal static extern TextHandle safelight_client_upload_image(ClientHandle client, IntPtr data, UIntPtr num_bytes, out ErrorHandle error);

        [DllImport(Library, CallingConvention = C)] internal static extern RequestHandle safelight_request_new(byte[] prompt);
        [DllImport(Library, CallingConvention = C)] internal static extern RequestHandle safelight_request_from_json(byte[] json, out ErrorHandle error);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_model(RequestHandle request, byte[] model);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_negative_prompt(RequestHandle request, byte[] prompt);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_size(RequestHandle request, int width_px, int height_px);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_num_inference_steps(RequestHandle request, int steps);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_guidance_scale(RequestHandle request, double scale);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_init_image(RequestHandle request, byte[] image);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_strength(RequestHandle request, double strength);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_mask(RequestHandle request, byte[] image);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_guidance_interval(RequestHandle request, double start, double end);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_guidance_rescale(RequestHandle request, double rescale);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_quality_floor(RequestHandle request, int min_num_steps, int cheaper_previews, double min_similarity);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_add_output(RequestHandle request, ulong seed);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_preview_max_edge(RequestHandle request, int max_edge_px);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_preview_every_n_steps(RequestHandle request, int n);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_set_picture_media_type(RequestHandle request, byte[] media_type);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_request_free(IntPtr request);

        [DllImport(Library, CallingConvention = C)] internal static extern GenerationHandle safelight_generate(ClientHandle client, RequestHandle request, double timeout_s, out ErrorHandle error);
        [DllImport(Library, CallingConvention = C)] internal static extern GenerationHandle safelight_watch(ClientHandle client, byte[] generation, RequestHandle request, double timeout_s, out ErrorHandle error);
        [DllImport(Library, CallingConvention = C)] internal static extern State safelight_generation_state(GenerationHandle generation);
        [DllImport(Library, CallingConvention = C)] internal static extern State safelight_generation_wait(GenerationHandle generation, double timeout_s);
        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_generation_name(GenerationHandle generation);
        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_generation_size(GenerationHandle generation, out int width_px, out int height_px);
        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_generation_error(GenerationHandle generation);
        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_generation_step(GenerationHandle generation, int output_index, out int num_steps);
        [DllImport(Library, CallingConvention = C)] internal static extern TextHandle safelight_generation_cancel(GenerationHandle generation, out ErrorHandle error);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_generation_close(GenerationHandle generation);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_generation_free(IntPtr generation);
        [DllImport(Library, CallingConvention = C)] internal static extern PollResult safelight_generation_poll_rgba8(GenerationHandle generation, int output_index, IntPtr pixels, UIntPtr num_bytes, UIntPtr row_pitch, int flip, out int width_px, out int height_px, out int step);
        [DllImport(Library, CallingConvention = C)] internal static extern PollResult safelight_generation_poll_scaled_rgba8(GenerationHandle generation, int output_index, IntPtr pixels, UIntPtr num_bytes, UIntPtr row_pitch, int flip, int width_px, int height_px, out int step);
        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_generation_picture(GenerationHandle generation, int output_index);

        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_image_media_type(IntPtr image);
        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_image_width_px(IntPtr image);
        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_image_height_px(IntPtr image);
        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_image_stride_bytes(IntPtr image);
        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_image_bottom_up(IntPtr image);
        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_image_data(IntPtr image, out UIntPtr num_bytes);
        [DllImport(Library, CallingConvention = C)] internal static extern ulong safelight_image_seed(IntPtr image);

        [DllImport(Library, CallingConvention = C)] internal static extern EventHandle safelight_generation_next(GenerationHandle generation, double timeout_s);
        [DllImport(Library, CallingConvention = C)] internal static extern EventKind safelight_event_get_kind(EventHandle @event);
        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_event_output_index(EventHandle @event);
        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_event_step(EventHandle @event);
        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_event_num_steps(EventHandle @event);
        [DllImport(Library, CallingConvention = C)] internal static extern int safelight_event_num_dropped(EventHandle @event);
        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_event_image(EventHandle @event);
        [DllImport(Library, CallingConvention = C)] internal static extern IntPtr safelight_event_json(EventHandle @event);
        [DllImport(Library, CallingConvention = C)] internal static extern void safelight_event_free(IntPtr @event);

        /// <summary>Converts a text for the library: UTF-8 with a zero byte, on every platform; null stays null.</summary>
        internal static byte[] Utf8(string text)
        {
            if (text == null) return null;
            if (text.IndexOf('\0') >= 0) throw new ArgumentException("a text must not contain the character U+0000");
            return Encoding.UTF8.GetBytes(text + '\0');
        }

        /// <summary>Copies a text of the library.</summary>
        internal static string Text(IntPtr utf8)
        {
            if (utf8 == IntPtr.Zero) return "";
            int length = 0;
            while (Marshal.ReadByte(utf8, length) != 0) ++length;
            return Encoding.UTF8.GetString(Bytes(utf8, length));
        }

        internal static byte[] Bytes(IntPtr data, int numBytes)
        {
            var bytes = new byte[numBytes];
            if (numBytes > 0) Marshal.Copy(data, bytes, 0, numBytes);
            return bytes;
        }
    }

    internal enum EventKind { Accepted = 1, Progress = 2, Preview = 3, Picture = 4, Finished = 5 }
}
